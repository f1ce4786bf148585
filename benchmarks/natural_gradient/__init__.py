"""Natural gradients with the defaults on every posterior, against Adam: ``natural_gradient.md``."""
