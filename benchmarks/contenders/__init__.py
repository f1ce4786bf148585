"""What runs in the contenders' own processes, one module per library; each lists its tasks in ``COMMANDS``."""
