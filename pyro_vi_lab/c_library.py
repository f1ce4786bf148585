"""C functions that generated code may call: special functions and linear algebra."""

from __future__ import annotations

import re

PRELUDE = """\
typedef __INT64_TYPE__ int64_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINT64_TYPE__ uint64_t;
#define INT64_C(number) ((int64_t)number##LL)
typedef struct {
    const void *const *constants;
    void (*const *lapack)(void);
    uint64_t calls;
} vl_state;
extern void *malloc(__SIZE_TYPE__);
extern void free(void *);
/* glibc has these functions for vectors too, to within 4 units in the last place; it says so to -ffast-math alone */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && VL_VECTOR_MATH >= 1
#define VL_VECTOR1 __attribute__((simd("notinbranch")))
#else
#define VL_VECTOR1
#endif
#if VL_VECTOR_MATH >= 2
#define VL_VECTOR2 VL_VECTOR1
#else
#define VL_VECTOR2
#endif
"""
"""What all generated code starts with. No headers: half of the time to compile a small function would go there."""

_VECTOR1 = ("exp", "log", "sin", "cos")
_VECTOR2 = (
    *("exp2", "expm1", "log2", "log10", "log1p", "tan", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc"),
)
_SCALAR = ("sqrt", "fabs", "floor", "ceil", "trunc", "rint")
_BINARY = {"pow": "VL_VECTOR1", "atan2": "VL_VECTOR2", "hypot": "VL_VECTOR2", "fmod": "", "copysign": ""}


def _declarations() -> dict[str, str]:
    marks = {
        **dict.fromkeys(_VECTOR1, "VL_VECTOR1"),
        **dict.fromkeys(_VECTOR2, "VL_VECTOR2"),
        **dict.fromkeys(_SCALAR, ""),
    }
    texts = {}
    for name, mark in marks.items():
        texts[name] = f"extern {mark} double {name}(double);"
        texts[f"{name}f"] = f"extern {mark} float {name}f(float);"
    for name, mark in _BINARY.items():
        texts[name] = f"extern {mark} double {name}(double, double);"
        texts[f"{name}f"] = f"extern {mark} float {name}f(float, float);"
    texts["lgamma_r"] = "extern double lgamma_r(double, int *);"
    return {name: re.sub(" +", " ", text) for name, text in texts.items()}


FUNCTIONS: dict[str, str] = {
    **_declarations(),
    "vl_index": """
/* An index that may count from the end; one that is out of range is reported. */
static inline int64_t vl_index(int64_t i, int64_t size, int *bad) {
    if (i < 0) i += size;
    if (i < 0 || i >= size) { *bad = 1; return 0; }
    return i;
}""",
    "vl_lgamma": """
static double vl_lgamma(double x) {
    int sign; /* lgamma itself writes to a global variable */
    return x == -__builtin_inf() ? __builtin_inf() : lgamma_r(x, &sign);
}""",
    "vl_digamma": """
/* Recurrence up to 10, then the asymptotic series; as in Cephes (Moshier), psi.c. */
static double vl_digamma(double x) {
    double result = 0, y = 0;
    if (x == 0) return copysign(__builtin_inf(), -x);
    if (x < 0) {
        if (x == trunc(x)) return __builtin_nan("");
        result = -3.14159265358979323846 / tan(3.14159265358979323846 * (x - trunc(x)));
        x = 1 - x;
    }
    for (; x < 10; x += 1) result -= 1 / x;
    if (x < 1e17) {
        const double z = 1 / (x * x);
        y = z * (8.33333333333333333333e-2 + z * (-8.33333333333333333333e-3 + z * (3.96825396825396825397e-3
            + z * (-4.16666666666666666667e-3 + z * (7.57575757575757575758e-3 + z * (-2.10927960927960927961e-2
            + z * 8.33333333333333333333e-2))))));
    }
    return result + log(x) - 0.5 / x - y;
}""",
    "vl_trigamma": """
/* Recurrence up to 10, then the asymptotic series (Abramowitz & Stegun 6.4.12). */
static double vl_trigamma(double x) {
    double result = 0, sign = 1;
    if (x < 0.5) {
        const double s = sin(3.14159265358979323846 * x);
        result = -9.86960440108935861883 / (s * s);
        sign = -1;
        x = 1 - x;
    }
    for (; x < 10; x += 1) result += 1 / (x * x);
    const double z = 1 / (x * x);
    const double series = 1. / 6 + z * (-1. / 30 + z * (1. / 42 + z * (-1. / 30 + z * (5. / 66 + z * (-691. / 2730
        + z * (7. / 6))))));
    return sign * (result + 1 / x + z / 2 + z / x * series);
}""",
    "vl_zeta": """
/* The Hurwitz zeta function by Euler-Maclaurin summation; as in Cephes (Moshier), zeta.c. */
static double vl_zeta(double s, double q) {
    static const double A[] = {12.0, -720.0, 30240.0, -1209600.0, 47900160.0, -1.8924375803183791606e9,
        7.47242496e10, -2.950130727918164224e12, 1.1646782814350067249e14, -4.5979787224074726105e15,
        1.8152105401943546773e17, -7.1661652561756670113e18};
    if (s == 1) return __builtin_inf();
    if (!(s > 1)) return __builtin_nan("");
    if (q <= 0) {
        if (q == floor(q)) return __builtin_inf();
        if (s != floor(s)) return __builtin_nan("");
    }
    double sum = pow(q, -s), a = q, b = 0;
    for (int i = 0; i < 9 || a <= 9; ++i) {
        a += 1;
        b = pow(a, -s);
        sum += b;
        if (-1.2e-16 * sum < b && b < 1.2e-16 * sum) return sum;
    }
    sum += b * a / (s - 1) - 0.5 * b;
    double factor = 1, k = 0;
    for (int i = 0; i < 12; ++i) {
        factor *= s + k;
        b /= a;
        const double term = factor * b / A[i];
        sum += term;
        if (fabs(term / sum) < 1.2e-16) return sum;
        factor *= s + k + 1;
        b /= a;
        k += 2;
    }
    return sum;
}""",
    "vl_polygamma": """
static double vl_polygamma(int n, double x) {
    double factor = n % 2 ? 1 : -1;
    for (int i = 2; i <= n; ++i) factor *= i;
    return factor * vl_zeta(n + 1, x);
}""",
    "vl_erfinv": """
/* A rational approximation and two steps of Newton's method, as in ATen/native/Math.h. */
static double vl_erfinv(double y) {
    const double size = fabs(y);
    double x;
    if (!(size <= 1)) return __builtin_nan("");
    if (size == 1) return copysign(__builtin_inf(), y);
    if (size <= 0.7) {
        const double z = y * y;
        x = y * (((-0.140543331 * z + 0.914624893) * z - 1.645349621) * z + 0.886226899)
            / ((((0.012229801 * z - 0.329097515) * z + 1.442710462) * z - 2.118377725) * z + 1);
    } else {
        const double z = sqrt(-log((1 - size) / 2));
        x = copysign(((1.641345311 * z + 3.429567803) * z - 1.624906493) * z - 1.970840454, y)
            / ((1.637067800 * z + 3.543889200) * z + 1);
    }
    x -= (erf(x) - y) / (1.12837916709551257390 * exp(-x * x));
    x -= (erf(x) - y) / (1.12837916709551257390 * exp(-x * x));
    return x;
}""",
    "vl_logaddexp": """
static inline double vl_logaddexp(double a, double b) {
    if (a != a || b != b) return a + b;
    const double most = a > b ? a : b, least = a > b ? b : a;
    return most == least && most - most != 0 ? most : most + log1p(exp(least - most));
}""",
    "vl_power": """
static int64_t vl_power(int64_t base, int64_t exponent) {
    uint64_t result = 1, square = (uint64_t)base;
    if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent % 2 ? -1 : 1) : 0;
    for (; exponent; exponent >>= 1, square *= square) if (exponent & 1) result *= square;
    return (int64_t)result;
}""",
    "vl_floor_divide": """
static inline int64_t vl_floor_divide(int64_t a, int64_t b) {
    const int64_t q = b ? a / b : 0;
    return q - (b && a % b != 0 && (a < 0) != (b < 0));
}""",
    "vl_remainder": """
static inline double vl_remainder(double a, double b) {
    const double r = fmod(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}""",
    "vl_cholesky": """
/* Lower factor of A; the order of the leading minor that is not positive, or 0. Row and column distances follow each
   pointer. Large matrices go to LAPACK, whose columns are our rows. */
static int vl_cholesky(void (*const *lapack)(void), long n, const double *a, long ar, long ac, double *l, long lr,
                       long lc) {
    if (n >= 32) {
        double *w = malloc(sizeof(double) * n * n);
        int size = (int)n, info = 0;
        for (long i = 0; i < n; ++i) for (long j = 0; j < n; ++j) w[i * n + j] = a[i * ar + j * ac];
        ((void (*)(char *, int *, double *, int *, int *))lapack[0])("U", &size, w, &size, &info);
        for (long i = 0; i < n; ++i) for (long j = 0; j < n; ++j) l[i * lr + j * lc] = j > i ? 0 : w[i * n + j];
        free(w);
        return info;
    }
    for (long i = 0; i < n; ++i) for (long j = i + 1; j < n; ++j) l[i * lr + j * lc] = 0;
    for (long j = 0; j < n; ++j) {
        double d = a[j * ar + j * ac];
        for (long k = 0; k < j; ++k) d -= l[j * lr + k * lc] * l[j * lr + k * lc];
        if (!(d > 0)) {
            for (long i = j; i < n; ++i) for (long k = 0; k <= i; ++k) l[i * lr + k * lc] = a[i * ar + k * ac];
            return (int)j + 1;
        }
        d = sqrt(d);
        l[j * lr + j * lc] = d;
        for (long i = j + 1; i < n; ++i) {
            double s = a[i * ar + j * ac];
            for (long k = 0; k < j; ++k) s -= l[i * lr + k * lc] * l[j * lr + k * lc];
            l[i * lr + j * lc] = s / d;
        }
    }
    return 0;
}""",
    "vl_triangular": """
/* X of A X = B, for a triangular A (n, n) and B (n, m). */
static void vl_triangular(void (*const *lapack)(void), long n, long m, const double *a, long ar, long ac,
                          const double *b, long br, long bc, double *x, long xr, long xc, int upper, int unit) {
    if (n >= 32 && ac == 1 && ar == n && bc == 1 && br == m && xc == 1 && xr == m) {
        int rows = (int)n, columns = (int)m;
        double one = 1;
        for (long i = 0; i < n * m; ++i) x[i] = b[i];
        ((void (*)(char *, char *, char *, char *, int *, int *, double *, const double *, int *, double *, int *))
            lapack[1])("R", upper ? "L" : "U", "N", unit ? "U" : "N", &columns, &rows, &one, a, &rows, x, &columns);
        return;
    }
    for (long step = 0; step < n; ++step) {
        const long i = upper ? n - 1 - step : step;
        for (long j = 0; j < m; ++j) x[i * xr + j * xc] = b[i * br + j * bc];
        for (long k = upper ? i + 1 : 0; k < (upper ? n : i); ++k)
            for (long j = 0; j < m; ++j) x[i * xr + j * xc] -= a[i * ar + k * ac] * x[k * xr + j * xc];
        if (!unit) for (long j = 0; j < m; ++j) x[i * xr + j * xc] /= a[i * ar + i * ac];
    }
}""",
    "vl_lu": """
/* Factors of P A = L U in one matrix and the exchanged rows, counted from 1; the first zero pivot, or 0. */
static int vl_lu(void (*const *lapack)(void), long n, const double *a, long ar, long ac, double *f, long fr, long fc,
                 int32_t *p, long pr) {
    int info = 0;
    if (n >= 32) {
        double *w = malloc(sizeof(double) * n * n + sizeof(int) * n);
        int *pivots = (int *)(w + n * n), size = (int)n;
        for (long j = 0; j < n; ++j) for (long i = 0; i < n; ++i) w[j * n + i] = a[i * ar + j * ac];
        ((void (*)(int *, int *, double *, int *, int *, int *))lapack[2])(&size, &size, w, &size, pivots, &info);
        for (long j = 0; j < n; ++j) for (long i = 0; i < n; ++i) f[i * fr + j * fc] = w[j * n + i];
        for (long i = 0; i < n; ++i) p[i * pr] = pivots[i];
        free(w);
        return info;
    }
    for (long i = 0; i < n; ++i) for (long j = 0; j < n; ++j) f[i * fr + j * fc] = a[i * ar + j * ac];
    for (long j = 0; j < n; ++j) {
        long best = j;
        for (long i = j + 1; i < n; ++i) if (fabs(f[i * fr + j * fc]) > fabs(f[best * fr + j * fc])) best = i;
        p[j * pr] = (int32_t)best + 1;
        if (f[best * fr + j * fc] == 0) { if (!info) info = (int)j + 1; continue; }
        if (best != j)
            for (long k = 0; k < n; ++k) {
                const double t = f[j * fr + k * fc];
                f[j * fr + k * fc] = f[best * fr + k * fc];
                f[best * fr + k * fc] = t;
            }
        for (long i = j + 1; i < n; ++i) {
            const double t = f[i * fr + j * fc] /= f[j * fr + j * fc];
            for (long k = j + 1; k < n; ++k) f[i * fr + k * fc] -= t * f[j * fr + k * fc];
        }
    }
    return info;
}""",
    "vl_lu_solve": """
/* X of A X = B, or of the transpose of A, of the factors of A. */
static void vl_lu_solve(long n, long m, const double *f, long fr, long fc, const int32_t *p, long pr, const double *b,
                        long br, long bc, double *x, long xr, long xc, int transposed) {
    for (long i = 0; i < n; ++i) for (long j = 0; j < m; ++j) x[i * xr + j * xc] = b[i * br + j * bc];
    for (int turn = 0; turn < 3; ++turn) {
        const int what = transposed ? 2 - turn : turn;
        if (what == 0)
            for (long s = 0; s < n; ++s) {
                const long i = transposed ? n - 1 - s : s, k = p[i * pr] - 1;
                if (k != i)
                    for (long j = 0; j < m; ++j) {
                        const double t = x[i * xr + j * xc];
                        x[i * xr + j * xc] = x[k * xr + j * xc];
                        x[k * xr + j * xc] = t;
                    }
            }
        else {
            const int backward = (what == 2) != transposed;
            for (long s = 0; s < n; ++s) {
                const long i = backward ? n - 1 - s : s;
                for (long k = backward ? i + 1 : 0; k < (backward ? n : i); ++k) {
                    const double t = transposed ? f[k * fr + i * fc] : f[i * fr + k * fc];
                    for (long j = 0; j < m; ++j) x[i * xr + j * xc] -= t * x[k * xr + j * xc];
                }
                if (what == 2) for (long j = 0; j < m; ++j) x[i * xr + j * xc] /= f[i * fr + i * fc];
            }
        }
    }
}""",
    "vl_eigh": """
/* Eigenvalues, ascending, and eigenvectors as columns of V (if it is wanted) of a symmetric A, from one of its halves;
   not a number where LAPACK finds none. */
static int vl_eigh(void (*const *lapack)(void), long n, const double *a, long ar, long ac, int upper, double *d,
                   long dr, double *v, long vr, long vc) {
    int size = (int)n, info = 0, lwork = (int)(1 + 6 * n + 2 * n * n), liwork = (int)(3 + 5 * n);
    double *w = malloc(sizeof(double) * (n * n + n + lwork) + sizeof(int) * liwork);
    double *values = w + n * n, *work = values + n;
    for (long j = 0; j < n; ++j) for (long i = 0; i < n; ++i) w[j * n + i] = a[i * ar + j * ac];
    ((void (*)(char *, char *, int *, double *, int *, double *, double *, int *, int *, int *, int *))lapack[4])(
        v ? "V" : "N", upper ? "U" : "L", &size, w, &size, values, work, &lwork, (int *)(work + lwork), &liwork, &info);
    for (long j = 0; j < n; ++j) {
        d[j * dr] = info ? 0.0 / 0.0 : values[j];
        if (v) for (long i = 0; i < n; ++i) v[i * vr + j * vc] = info ? 0.0 / 0.0 : w[j * n + i];
    }
    free(w);
    return info;
}""",
    "vl_qr": """
/* The triangular factor R (k, m), k = min(n, m), of A (n, m). */
static int vl_qr(void (*const *lapack)(void), long n, long m, const double *a, long ar, long ac, double *r, long rr,
                 long rc) {
    const long k = n < m ? n : m;
    int rows = (int)n, columns = (int)m, lwork = (int)(32 * m), info = 0;
    double *w = malloc(sizeof(double) * (n * m + k + lwork));
    for (long j = 0; j < m; ++j) for (long i = 0; i < n; ++i) w[j * n + i] = a[i * ar + j * ac];
    ((void (*)(int *, int *, double *, int *, double *, double *, int *, int *))lapack[5])(
        &rows, &columns, w, &rows, w + n * m, w + n * m + k, &lwork, &info);
    for (long i = 0; i < k; ++i) for (long j = 0; j < m; ++j) r[i * rr + j * rc] = j < i ? 0 : w[j * n + i];
    free(w);
    return info;
}""",
    "vl_product": """
/* C (n, m) = A (n, k) B (k, m), rows in order. */
static void vl_product(void (*const *lapack)(void), long n, long k, long m, const double *a, const double *b,
                       double *c) {
    int rows = (int)n, inner = (int)k, columns = (int)m;
    double one = 1, zero = 0;
    ((void (*)(char *, char *, int *, int *, int *, double *, const double *, int *, const double *, int *, double *,
        double *, int *))lapack[3])("N", "N", &columns, &rows, &inner, &one, b, &columns, a, &inner, &zero, c,
        &columns);
}""",
}
"""C text of every function that is declared or defined where it is needed."""

LAPACK = (
    *(("cython_lapack", "dpotrf"), ("cython_blas", "dtrsm"), ("cython_lapack", "dgetrf"), ("cython_blas", "dgemm")),
    *(("cython_lapack", "dsyevd"), ("cython_lapack", "dgeqrf")),
)
"""Functions of SciPy whose addresses generated code is given, in order: module and name."""

_WORD = re.compile(r"\b[a-z]\w*(?=\()")


def prelude(text: str) -> str:
    """Everything that generated C text needs before it."""
    seen: set[str] = set()
    needed: list[str] = []

    def need(text: str) -> None:
        for name in dict.fromkeys(_WORD.findall(text)):
            if name in FUNCTIONS and name not in seen:
                seen.add(name)
                need(FUNCTIONS[name])
                needed.append(name)

    need(text)
    return PRELUDE + "\n".join(FUNCTIONS[name].strip() for name in needed) + "\n"
