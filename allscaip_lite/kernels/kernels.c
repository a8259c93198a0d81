/* The sums over pairs of edges around one atom, attention among all atoms, and what is done to each
   number; see compiled.py.

   What `attention.neighborhood_attention` and `encodings.bond_orientational_order` do with padded
   tables is done here row by row: a row's numbers fit into the nearest cache, empty slots do not
   exist, and nothing of size K x K is ever kept. The backward passes do the forward's work again.

   A row i owns the edges first[i] .. first[i+1], its self-edge first; state[] says which row of
   qkv each one is. Compiled twice, with REAL float and double. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif

/* Bytes of the processor's widest registers: compilers make slow code of vecs that do not fit one. */
#ifndef BYTES
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#endif

/* numbers for one such register; they may stand anywhere in memory */
typedef REAL vec __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
enum { W = BYTES / sizeof(REAL) };     /* numbers in a vec */
enum { XYZ = (3 + W - 1) / W * W };    /* three of them, in whole vecs */
enum { TILE = 8 };                     /* vecs of a product that are summed at once */

typedef struct {
    int heads, size, groups;      /* size: channels of a head */
    const int *width;             /* channels of each Legendre degree, `groups` of them */
    const long *first, *state;
    const REAL *log_weight, *direction;
} Rows;

static size_t padded(size_t n) { return (n + W - 1) / W * W; }

/* n numbers, zero, with room behind them for what `product` reads too much */
static REAL *numbers(size_t n) { return calloc(n + (TILE + 1) * 1024, sizeof(REAL)); }

/* `rows` x `across` vecs of a product; both are constants where it is called */
static inline __attribute__((always_inline)) void
tile(const int rows, const int across, int stored, size_t inner, const REAL *a, size_t row_step,
     size_t inner_step, const REAL *b, size_t b_step, REAL *c, size_t c_step)
{
    vec sum[rows][across];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < across; j++)
            sum[r][j] = (vec){0};
    for (size_t i = 0; i < inner; i++)
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < across; j++)
                sum[r][j] += a[r * row_step + i * inner_step] * *(const vec *)(b + i * b_step + j * W);
    for (int r = 0; r < rows && r < stored; r++)
        for (int j = 0; j < across; j++)
            *(vec *)(c + r * c_step + j * W) = sum[r][j];
}

/* c[r][:] = sum_i a(r, i) b[i][:] with a read by its two strides. Whole vecs are read and written:
   c and b reach to the next multiple of W columns, and a to the next multiple of TILE rows. */
static void product(size_t rows, size_t columns, size_t inner, const REAL *a, size_t row_step,
                    size_t inner_step, const REAL *b, size_t b_step, REAL *c, size_t c_step)
{
    size_t j = 0;
    for (; j + W < columns; j += 2 * W)
        for (size_t r = 0; r < rows; r += TILE / 2)
            tile(TILE / 2, 2, rows - r, inner, a + r * row_step, row_step, inner_step, b + j, b_step,
                 c + r * c_step + j, c_step);
    for (; j < columns; j += W)
        for (size_t r = 0; r < rows; r += TILE)
            tile(TILE, 1, rows - r, inner, a + r * row_step, row_step, inner_step, b + j, b_step,
                 c + r * c_step + j, c_step);
}

/* Where loops are long, the widest registers pay; compilers would take narrower ones. */
#if defined(__AVX512F__) && !defined(__clang__)
#define LONG_LOOPS __attribute__((target("prefer-vector-width=512")))
#else
#define LONG_LOOPS
#endif

/* exp for x <= 0, to the last bit or two; in float by a polynomial, which compilers vectorise, and 0
   below 1e-26: what came near the smallest float would make products slow on some processors */
static inline REAL exponential(REAL x)
{
    if (sizeof(REAL) == 8)
        return exp(x);
    float y = x < -60.0f ? -60.0f : (float)x;
    float n = (float)(int)(y * 1.44269504f - 0.5f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    /* masked, not chosen: a branch here would keep compilers from vectorising */
    union { int bits; float value; } scale = {.bits = (((int)n + 127) << 23) & -(x >= -60.0f)};
    return p * scale.value;
}

/* legendre[l-1][e][f] = P_l(cos of e and f) for l = 1 .. degree, rows of `wide`; 0 for the
   self-edge, which has no direction, and in the padding. slope and curvature, if they are there:
   P_l' and P_l'', which mean nothing in those places. */
static void angles(size_t n, size_t wide, int degree, const REAL *direction, REAL *legendre,
                   REAL *slope, REAL *curvature)
{
    size_t layer = (size_t)n * wide;
    if (degree < 1)
        return;
    memset(legendre, 0, wide * sizeof(REAL));
    for (size_t e = 1; e < n; e++) {
        const REAL *u = direction + 3 * e;
        REAL *p = legendre + e * wide;
        for (size_t f = 0; f < wide; f++)
            p[f] = 0;
        for (size_t f = 1; f < n; f++)
            p[f] = u[0] * direction[3 * f] + u[1] * direction[3 * f + 1] + u[2] * direction[3 * f + 2];
    }
    for (int l = 1; l < degree; l++) { /* (l+1) P_(l+1) = (2l+1) x P_l - l P_(l-1) */
        const REAL *x = legendre, *now = legendre + (l - 1) * layer, *before = now - layer;
        REAL *next = legendre + l * layer, a = (2 * l + 1) / (REAL)(l + 1), b = l / (REAL)(l + 1);
        for (size_t e = 0; e < n; e++)
            for (size_t f = 0; f < wide; f++) {
                size_t ef = e * wide + f;
                REAL real = e && f && f < n;
                next[ef] = a * x[ef] * now[ef] - b * (l > 1 ? before[ef] : real);
            }
    }
    for (int l = 0; slope && l < degree; l++) { /* P_(l+1)' = P_(l-1)' + (2l+1) P_l */
        const REAL *p = legendre + (l - 1) * layer, *before = slope + (l - 2) * layer;
        REAL *now = slope + l * layer;
        for (size_t ef = 0; ef < layer; ef++)
            now[ef] = (l ? (2 * l + 1) * p[ef] : 1) + (l > 1 ? before[ef] : 0);
    }
    for (int l = 0; curvature && l < degree; l++) { /* and so the next: (2l+1) P_l' + P_(l-1)'' */
        const REAL *p = slope + (l - 1) * layer, *before = curvature + (l - 2) * layer;
        REAL *now = curvature + l * layer;
        for (size_t ef = 0; ef < layer; ef++)
            now[ef] = (l ? (2 * l + 1) * p[ef] : 0) + (l > 1 ? before[ef] : 0);
    }
}

/* d_direction[e] += sum_f (pull[e][f] + pull[f][e]) direction[f], pull being dE/dcos; nothing comes
   from self-edges and nothing goes to them. memory: 3 n XYZ numbers. */
static void turn(size_t n, size_t wide, const REAL *pull, const REAL *direction, REAL *memory,
                 REAL *d_direction)
{
    REAL *other = memory + n * XYZ, *rows = other + n * XYZ; /* directions in whole vecs */
    for (size_t e = 0; e < n; e++)
        for (size_t x = 0; x < XYZ; x++)
            rows[e * XYZ + x] = e && x < 3 ? direction[3 * e + x] : 0;
    product(n, 3, n, pull, wide, 1, rows, XYZ, memory, XYZ);
    product(n, 3, n, pull, 1, wide, rows, XYZ, other, XYZ);
    for (size_t e = 1; e < n; e++)
        for (int x = 0; x < 3; x++)
            d_direction[3 * e + x] += memory[e * XYZ + x] + other[e * XYZ + x];
}

/* change[e][f] = d(cos of e and f) where the directions change by d_direction; 0 as in `angles` */
static void cosine_change(size_t n, size_t wide, const REAL *direction, const REAL *d_direction,
                          REAL *change)
{
    memset(change, 0, n * wide * sizeof(REAL));
    for (size_t e = 1; e < n; e++)
        for (size_t f = 1; f < n; f++)
            for (int x = 0; x < 3; x++)
                change[e * wide + f] += d_direction[3 * e + x] * direction[3 * f + x] +
                                        direction[3 * e + x] * d_direction[3 * f + x];
}

/* --- neighbourhood attention ------------------------------------------------------------------ */

/* Edges of the fullest of the rows begin .. end. */
static size_t fullest(const Rows *rows, int begin, int end)
{
    long found = 1;
    for (int i = begin; i < end; i++)
        if (rows->first[i + 1] - rows->first[i] > found)
            found = rows->first[i + 1] - rows->first[i];
    return found;
}

/* log weights of n edges, and of the padding so little that it never weighs */
static void pad_bias(size_t n, size_t wide, const REAL *log_weight, REAL *bias)
{
    for (size_t f = 0; f < wide; f++)
        bias[f] = f < n ? log_weight[f] : (REAL)-1e30;
}

/* out[d][e] = x[e][d] for n rows of `size` numbers */
static void transpose(size_t n, size_t size, const REAL *x, size_t step, REAL *out, size_t out_step)
{
    for (size_t d = 0; d < size; d++)
        for (size_t e = 0; e < n; e++)
            out[d * out_step + e] = x[e * step + d];
}

/* Of one head, from q and the transposed k: the products q.k of each degree (in `score`) and the
   softmax of their weighted sum (in `weight`); both n rows of `wide`. */
static void attend(size_t n, size_t wide, const Rows *rows, const REAL *bias, const REAL *q,
                   size_t q_step, const REAL *keys, const REAL *legendre, REAL *score, REAL *weight)
{
    size_t layer = n * wide;
    REAL scale = 1 / sqrt((double)rows->size);
    for (int l = 0, d = 0; l < rows->groups; d += rows->width[l++])
        product(n, wide, rows->width[l], q + d, q_step, 1, keys + d * wide, wide, score + l * layer,
                wide);
    for (size_t e = 0; e < n; e++) {
        REAL *w = weight + e * wide, largest = -1e30, total = 0;
        const REAL *s = score + e * wide, *p = legendre + e * wide - layer;
        for (size_t f = 0; f < wide; f++)
            w[f] = s[f];
        for (int l = 1; l < rows->groups; l++)
            for (size_t f = 0; f < wide; f++)
                w[f] += p[l * layer + f] * s[l * layer + f];
        for (size_t f = 0; f < wide; f++) {
            w[f] = scale * w[f] + bias[f];
            largest = w[f] > largest ? w[f] : largest;
        }
        for (size_t f = 0; f < wide; f++) {
            w[f] = exponential(w[f] - largest);
            total += w[f];
        }
        for (size_t f = 0; f < wide; f++)
            w[f] /= total;
    }
}

/* Rows begin .. end: out (M, heads*size) from qkv (M, 3*heads*size). Returns 0, or 1: no memory. */
int attention_forward(const Rows *rows, int begin, int end, const REAL *qkv, REAL *out)
{
    size_t size = rows->size, degrees = rows->groups - 1, hidden = rows->heads * size;
    size_t longest = fullest(rows, begin, end), wide = padded(longest), square = longest * wide;
    REAL *memory = numbers((2 * degrees + 2) * square + (size + 1) * wide +
                           (longest + TILE) * 3 * hidden + longest * padded(size));
    if (!memory)
        return 1;
    REAL *legendre = memory, *score = legendre + degrees * square;
    REAL *weight = score + (degrees + 1) * square, *keys = weight + square;
    REAL *bias = keys + size * wide, *local = bias + wide, *mixed = local + longest * 3 * hidden;
    for (int i = begin; i < end; i++) {
        const long *state = rows->state + rows->first[i];
        size_t n = rows->first[i + 1] - rows->first[i];
        wide = padded(n);
        for (size_t e = 0; e < n; e++)
            memcpy(local + e * 3 * hidden, qkv + state[e] * 3 * hidden, 3 * hidden * sizeof(REAL));
        pad_bias(n, wide, rows->log_weight + rows->first[i], bias);
        angles(n, wide, degrees, rows->direction + 3 * rows->first[i], legendre, NULL, NULL);
        for (int head = 0; head < rows->heads; head++) {
            const REAL *q = local + head * size, *k = q + hidden, *v = k + hidden;
            transpose(n, size, k, 3 * hidden, keys, wide);
            attend(n, wide, rows, bias, q, 3 * hidden, keys, legendre, score, weight);
            product(n, size, n, weight, wide, 1, v, 3 * hidden, mixed, padded(size));
            for (size_t e = 0; e < n; e++)
                memcpy(out + state[e] * hidden + head * size, mixed + e * padded(size),
                       size * sizeof(REAL));
        }
    }
    free(memory);
    return 0;
}

/* Its derivative: d_qkv (M, 3*heads*size), d_log_weight (E,) and d_direction (E, 3), all written. */
int attention_backward(const Rows *rows, int begin, int end, const REAL *qkv, const REAL *gradient,
                       REAL *d_qkv, REAL *d_log_weight, REAL *d_direction)
{
    size_t size = rows->size, degrees = rows->groups - 1, hidden = rows->heads * size;
    size_t longest = fullest(rows, begin, end), wide = padded(longest), square = longest * wide;
    size_t step = padded(size + W), tall = longest * step; /* the last degree writes past `size` */
    REAL *memory = numbers((4 * degrees + 4) * square + (2 * size + 1) * wide + 3 * tall +
                           (longest + TILE) * 4 * hidden + 3 * longest * XYZ);
    if (!memory)
        return 1;
    REAL *legendre = memory, *slope = legendre + degrees * square, *score = slope + degrees * square;
    REAL *pull = score + (degrees + 1) * square; /* dE/dP_l; in the end dE/dcos in the first layer */
    REAL *weight = pull + degrees * square, *d_weight = weight + square;
    REAL *d_product = d_weight + square, *keys = d_product + square, *values = keys + size * wide;
    REAL *dq = values + size * wide, *dk = dq + tall, *dv = dk + tall;
    REAL *bias = dv + tall, *local = bias + wide, *g = local + longest * 3 * hidden;
    REAL *spare = g + (longest + TILE) * hidden;
    REAL scale = 1 / sqrt((double)rows->size);
    for (int i = begin; i < end; i++) {
        const long *state = rows->state + rows->first[i];
        const REAL *direction = rows->direction + 3 * rows->first[i];
        REAL *d_bias = d_log_weight + rows->first[i];
        size_t n = rows->first[i + 1] - rows->first[i], layer = n * padded(n);
        wide = padded(n);
        for (size_t e = 0; e < n; e++) {
            memcpy(local + e * 3 * hidden, qkv + state[e] * 3 * hidden, 3 * hidden * sizeof(REAL));
            memcpy(g + e * hidden, gradient + state[e] * hidden, hidden * sizeof(REAL));
        }
        memset(pull, 0, degrees * layer * sizeof(REAL));
        memset(d_bias, 0, n * sizeof(REAL));
        memset(d_direction + 3 * rows->first[i], 0, 3 * n * sizeof(REAL));
        pad_bias(n, wide, rows->log_weight + rows->first[i], bias);
        angles(n, wide, degrees, direction, legendre, slope, NULL);
        for (int head = 0; head < rows->heads; head++) {
            const REAL *q = local + head * size, *k = q + hidden, *v = k + hidden;
            transpose(n, size, k, 3 * hidden, keys, wide);
            transpose(n, size, v, 3 * hidden, values, wide);
            attend(n, wide, rows, bias, q, 3 * hidden, keys, legendre, score, weight);
            product(n, wide, size, g + head * size, hidden, 1, values, wide, d_weight, wide);
            product(n, size, n, weight, 1, wide, g + head * size, hidden, dv, step);
            for (size_t e = 0; e < n; e++) { /* from weights to logits */
                REAL *dw = d_weight + e * wide, *w = weight + e * wide, mean = 0;
                for (size_t f = 0; f < n; f++)
                    mean += w[f] * dw[f];
                for (size_t f = 0; f < n; f++) {
                    dw[f] = w[f] * (dw[f] - mean);
                    d_bias[f] += dw[f];
                    dw[f] *= scale;
                }
                for (size_t f = n; f < wide; f++)
                    dw[f] = 0;
            }
            for (int l = 0, d = 0; l < rows->groups; d += rows->width[l++]) {
                const REAL *d_logit = d_weight;
                if (!rows->width[l])
                    continue;
                if (l) {
                    const REAL *p = legendre + (l - 1) * layer, *s = score + l * layer;
                    REAL *sum = pull + (l - 1) * layer;
                    for (size_t ef = 0; ef < layer; ef++) {
                        d_product[ef] = d_weight[ef] * p[ef];
                        sum[ef] += d_weight[ef] * s[ef];
                    }
                    d_logit = d_product;
                }
                /* whole vecs again: the next degree writes its own channels over it */
                product(n, rows->width[l], n, d_logit, wide, 1, k + d, 3 * hidden, dq + d, step);
                product(n, rows->width[l], n, d_logit, 1, wide, q + d, 3 * hidden, dk + d, step);
            }
            for (size_t e = 0; e < n; e++) {
                REAL *y = d_qkv + state[e] * 3 * hidden + head * size;
                memcpy(y, dq + e * step, size * sizeof(REAL));
                memcpy(y + hidden, dk + e * step, size * sizeof(REAL));
                memcpy(y + 2 * hidden, dv + e * step, size * sizeof(REAL));
            }
        }
        for (size_t l = 0; l < degrees; l++)
            for (size_t ef = 0; ef < layer; ef++)
                pull[ef] = (l ? pull[ef] : 0) + pull[l * layer + ef] * slope[l * layer + ef];
        if (degrees)
            turn(n, wide, pull, direction, spare, d_direction + 3 * rows->first[i]);
    }
    free(memory);
    return 0;
}

/* The derivative's derivative, for training on forces. `change`_qkv, _log_weight and _direction are
   what comes back to the three results of attention_backward; out go, all written, the derivatives
   by its four inputs: d_gradient (M, heads*size), d_qkv, d_log_weight and d_direction.

   Those three results, each times its change, add up to how far `gradient . attention` moves when
   qkv, log_weight and direction move by the changes. That is what is written down here, forwards,
   and then differentiated. Names: d_x is a derivative by x, x_change the movement of x. */
int attention_twice(const Rows *rows, int begin, int end, const REAL *qkv, const REAL *gradient,
                    const REAL *change_qkv, const REAL *change_log_weight,
                    const REAL *change_direction, REAL *d_gradient, REAL *d_qkv,
                    REAL *d_log_weight, REAL *d_direction)
{
    size_t size = rows->size, degrees = rows->groups - 1, hidden = rows->heads * size;
    size_t longest = fullest(rows, begin, end), wide = padded(longest), square = longest * wide;
    size_t step = padded(size + W), tall = longest * step;
    REAL *memory = numbers((8 * degrees + 14) * square + (4 * size + 1) * wide + 7 * tall +
                           (longest + TILE) * 7 * hidden + 3 * longest * XYZ);
    if (!memory)
        return 1;
    REAL *next = memory;
#define TAKE(name, count) REAL *name = next; next += (count)
    TAKE(legendre, degrees * square);
    TAKE(slope, degrees * square);
    TAKE(curvature, degrees * square);
    TAKE(turned, degrees * square); /* how far P_l moves */
    TAKE(d_legendre, degrees * square);
    TAKE(d_turned, degrees * square);
    TAKE(score, (degrees + 1) * square);
    TAKE(moved, (degrees + 1) * square); /* how far score moves */
    TAKE(other, square);
    TAKE(cosine, square); /* how far cosines move */
    TAKE(weight, square);
    TAKE(d_weight, square);
    TAKE(logit, square); /* how far logits move; in the end dE/dlogit */
    TAKE(weight_change, square);
    TAKE(d_weight_2, square);
    TAKE(d_change, square); /* dE/d(logit's movement), which is dE/dlogit of the first derivative */
    TAKE(first, square);
    TAKE(second, square);
    TAKE(d_cosine, square);
    TAKE(d_cosine_change, square);
    TAKE(keys, size * wide);
    TAKE(values, size * wide);
    TAKE(key_changes, size * wide);
    TAKE(value_changes, size * wide);
    TAKE(bias, wide);
    TAKE(dq, tall);
    TAKE(dq_2, tall);
    TAKE(dk, tall);
    TAKE(dk_2, tall);
    TAKE(dv, tall);
    TAKE(out, tall);
    TAKE(out_2, tall);
    TAKE(local, longest * 3 * hidden);
    TAKE(change, longest * 3 * hidden);
    TAKE(g, (longest + TILE) * hidden);
    TAKE(spare, 3 * longest * XYZ);
#undef TAKE
    REAL scale = 1 / sqrt((double)rows->size);
    for (int i = begin; i < end; i++) {
        const long *state = rows->state + rows->first[i], from = rows->first[i];
        const REAL *direction = rows->direction + 3 * from, *d_u = change_direction + 3 * from;
        const REAL *bias_change = change_log_weight + from;
        size_t n = rows->first[i + 1] - from, layer = n * padded(n), inside = 3 * hidden;
        wide = padded(n);
        for (size_t e = 0; e < n; e++) {
            memcpy(local + e * inside, qkv + state[e] * inside, inside * sizeof(REAL));
            memcpy(change + e * inside, change_qkv + state[e] * inside, inside * sizeof(REAL));
            memcpy(g + e * hidden, gradient + state[e] * hidden, hidden * sizeof(REAL));
        }
        memset(d_legendre, 0, degrees * layer * sizeof(REAL));
        memset(d_turned, 0, degrees * layer * sizeof(REAL));
        memset(d_log_weight + from, 0, n * sizeof(REAL));
        memset(d_direction + 3 * from, 0, 3 * n * sizeof(REAL));
        pad_bias(n, wide, rows->log_weight + from, bias);
        angles(n, wide, degrees, direction, legendre, slope, curvature);
        if (degrees)
            cosine_change(n, wide, direction, d_u, cosine);
        for (size_t l = 0; l < degrees; l++)
            for (size_t ef = 0; ef < layer; ef++)
                turned[l * layer + ef] = slope[l * layer + ef] * cosine[ef];
        for (int head = 0; head < rows->heads; head++) {
            const REAL *q = local + head * size, *k = q + hidden, *v = k + hidden;
            const REAL *qc = change + head * size, *kc = qc + hidden, *vc = kc + hidden;
            const REAL *go = g + head * size;
            transpose(n, size, k, inside, keys, wide);
            transpose(n, size, v, inside, values, wide);
            transpose(n, size, kc, inside, key_changes, wide);
            transpose(n, size, vc, inside, value_changes, wide);
            attend(n, wide, rows, bias, q, inside, keys, legendre, score, weight);

            /* forwards: how far products, logits and weights move */
            for (size_t e = 0; e < n; e++)
                for (size_t f = 0; f < wide; f++)
                    logit[e * wide + f] = 0;
            for (int l = 0, d = 0; l < rows->groups; d += rows->width[l++]) {
                REAL *m = moved + l * layer;
                if (!rows->width[l])
                    continue;
                product(n, wide, rows->width[l], qc + d, inside, 1, keys + d * wide, wide, m, wide);
                product(n, wide, rows->width[l], q + d, inside, 1, key_changes + d * wide, wide,
                        other, wide);
                const REAL *s = score + l * layer, *p = legendre + (l - 1) * layer;
                const REAL *t = turned + (l - 1) * layer;
                for (size_t ef = 0; ef < layer; ef++) {
                    m[ef] += other[ef];
                    logit[ef] += scale * (l ? p[ef] * m[ef] + t[ef] * s[ef] : m[ef]);
                }
            }
            product(n, wide, size, go, hidden, 1, values, wide, d_weight, wide);
            product(n, wide, size, go, hidden, 1, value_changes, wide, d_weight_2, wide);
            for (size_t e = 0; e < n; e++) {
                REAL *w = weight + e * wide, *dw = d_weight + e * wide, *dl = logit + e * wide;
                REAL *dc = d_change + e * wide, *wc = weight_change + e * wide;
                REAL *b = d_weight_2 + e * wide, mean = 0, drift = 0, total = 0;
                for (size_t f = 0; f < n; f++) {
                    dl[f] += bias_change[f];
                    mean += w[f] * dw[f];
                    drift += w[f] * dl[f];
                }
                for (size_t f = 0; f < n; f++) {
                    dc[f] = w[f] * (dw[f] - mean);
                    wc[f] = w[f] * (dl[f] - drift);
                    b[f] += dw[f] * (dl[f] - drift) - mean * dl[f];
                    total += w[f] * b[f];
                }
                for (size_t f = 0; f < n; f++) { /* backwards, from weights to logits */
                    dl[f] = w[f] * (b[f] - total);
                    d_log_weight[from + f] += dl[f];
                    dl[f] *= scale;
                    dc[f] *= scale;
                }
                for (size_t f = n; f < wide; f++)
                    dl[f] = dc[f] = wc[f] = w[f] = 0;
            }
            product(n, size, n, weight_change, wide, 1, v, inside, out, step);
            product(n, size, n, weight, wide, 1, vc, inside, out_2, step);
            product(n, size, n, weight_change, 1, wide, go, hidden, dv, step);
            for (int l = 0, d = 0; l < rows->groups; d += rows->width[l++]) {
                const REAL *by_change = d_change, *by_value = logit;
                if (!rows->width[l])
                    continue;
                if (l) {
                    const REAL *p = legendre + (l - 1) * layer, *t = turned + (l - 1) * layer;
                    const REAL *s = score + l * layer, *m = moved + l * layer;
                    REAL *dp = d_legendre + (l - 1) * layer, *dt = d_turned + (l - 1) * layer;
                    for (size_t ef = 0; ef < layer; ef++) {
                        first[ef] = d_change[ef] * p[ef];
                        second[ef] = d_change[ef] * t[ef] + logit[ef] * p[ef];
                        dp[ef] += d_change[ef] * m[ef] + logit[ef] * s[ef];
                        dt[ef] += d_change[ef] * s[ef];
                    }
                    by_change = first, by_value = second;
                }
                product(n, rows->width[l], n, by_change, wide, 1, kc + d, inside, dq + d, step);
                product(n, rows->width[l], n, by_value, wide, 1, k + d, inside, dq_2 + d, step);
                product(n, rows->width[l], n, by_change, 1, wide, qc + d, inside, dk + d, step);
                product(n, rows->width[l], n, by_value, 1, wide, q + d, inside, dk_2 + d, step);
            }
            for (size_t e = 0; e < n; e++) {
                REAL *y = d_qkv + state[e] * inside + head * size;
                REAL *z = d_gradient + state[e] * hidden + head * size;
                for (size_t d = 0; d < size; d++) {
                    y[d] = dq[e * step + d] + dq_2[e * step + d];
                    y[hidden + d] = dk[e * step + d] + dk_2[e * step + d];
                    y[2 * hidden + d] = dv[e * step + d];
                    z[d] = out[e * step + d] + out_2[e * step + d];
                }
            }
        }
        memset(d_cosine, 0, layer * sizeof(REAL));
        memset(d_cosine_change, 0, layer * sizeof(REAL));
        for (size_t l = 0; l < degrees; l++)
            for (size_t ef = 0; ef < layer; ef++) {
                size_t lef = l * layer + ef;
                d_cosine[ef] += d_legendre[lef] * slope[lef] +
                                d_turned[lef] * curvature[lef] * cosine[ef];
                d_cosine_change[ef] += d_turned[lef] * slope[lef];
            }
        if (degrees) {
            turn(n, wide, d_cosine, direction, spare, d_direction + 3 * from);
            turn(n, wide, d_cosine_change, d_u, spare, d_direction + 3 * from);
        }
    }
    free(memory);
    return 0;
}

/* --- bond-orientational order ------------------------------------------------------------------ */

/* sum[i][l-1] = sum_ef weight[e] weight[f] P_l(cos of e and f), l = 1 .. degree, for begin .. end */
int order_forward(const Rows *rows, int begin, int end, int degree, const REAL *weight, REAL *sum)
{
    size_t longest = fullest(rows, begin, end);
    REAL *legendre = numbers(degree * longest * padded(longest));
    if (!legendre)
        return 1;
    for (int i = begin; i < end; i++) {
        int n = rows->first[i + 1] - rows->first[i], wide = padded(n);
        const REAL *w = weight + rows->first[i];
        angles(n, wide, degree, rows->direction + 3 * rows->first[i], legendre, NULL, NULL);
        for (int l = 0; l < degree; l++) {
            REAL total = 0;
            for (int e = 0; e < n; e++) {
                const REAL *p = legendre + ((size_t)l * n + e) * wide;
                REAL part = 0;
                for (int f = 0; f < n; f++)
                    part += w[f] * p[f];
                total += w[e] * part;
            }
            sum[i * degree + l] = total;
        }
    }
    free(legendre);
    return 0;
}

/* Its derivative: d_weight (E,) and d_direction (E, 3), all written. */
int order_backward(const Rows *rows, int begin, int end, int degree, const REAL *weight,
                   const REAL *d_sum, REAL *d_weight, REAL *d_direction)
{
    size_t longest = fullest(rows, begin, end), square = longest * padded(longest);
    REAL *legendre = numbers((2 * degree + 1) * square + 3 * longest * XYZ);
    if (!legendre)
        return 1;
    REAL *slope = legendre + degree * square, *pull = slope + degree * square;
    REAL *spare = pull + square;
    for (int i = begin; i < end; i++) {
        int n = rows->first[i + 1] - rows->first[i], wide = padded(n);
        size_t layer = (size_t)n * wide;
        const REAL *w = weight + rows->first[i], *direction = rows->direction + 3 * rows->first[i];
        angles(n, wide, degree, direction, legendre, slope, NULL);
        for (int e = 0; e < n; e++) {
            REAL total = 0;
            for (int f = 0; f < wide; f++)
                pull[e * wide + f] = 0;
            for (int l = 0; l < degree; l++) {
                const REAL *p = legendre + l * layer + e * wide, *s = slope + l * layer + e * wide;
                REAL d = d_sum[i * degree + l];
                for (int f = 0; f < n; f++) {
                    total += d * w[f] * p[f];
                    pull[e * wide + f] += d * w[e] * w[f] * s[f];
                }
            }
            d_weight[rows->first[i] + e] = 2 * total;
        }
        memset(d_direction + 3 * rows->first[i], 0, 3 * n * sizeof(REAL));
        turn(n, wide, pull, direction, spare, d_direction + 3 * rows->first[i]);
    }
    free(legendre);
    return 0;
}

/* The derivative's derivative: see attention_twice. d_d_sum (rows, degree), d_weight, d_direction. */
int order_twice(const Rows *rows, int begin, int end, int degree, const REAL *weight,
                const REAL *d_sum, const REAL *change_weight, const REAL *change_direction,
                REAL *d_d_sum, REAL *d_weight, REAL *d_direction)
{
    size_t longest = fullest(rows, begin, end), square = longest * padded(longest);
    REAL *legendre = numbers((3 * degree + 3) * square + 3 * longest * XYZ);
    if (!legendre)
        return 1;
    REAL *slope = legendre + degree * square, *curvature = slope + degree * square;
    REAL *cosine = curvature + degree * square, *d_cosine = cosine + square;
    REAL *d_cosine_change = d_cosine + square, *spare = d_cosine_change + square;
    for (int i = begin; i < end; i++) {
        int n = rows->first[i + 1] - rows->first[i], wide = padded(n);
        size_t layer = (size_t)n * wide;
        const REAL *w = weight + rows->first[i], *direction = rows->direction + 3 * rows->first[i];
        const REAL *wc = change_weight + rows->first[i], *d_u = change_direction + 3 * rows->first[i];
        angles(n, wide, degree, direction, legendre, slope, curvature);
        cosine_change(n, wide, direction, d_u, cosine);
        memset(d_cosine, 0, layer * sizeof(REAL));
        memset(d_cosine_change, 0, layer * sizeof(REAL));
        memset(d_weight + rows->first[i], 0, n * sizeof(REAL));
        memset(d_direction + 3 * rows->first[i], 0, 3 * n * sizeof(REAL));
        for (int l = 0; l < degree; l++) {
            REAL d = d_sum[i * degree + l], sum = 0;
            for (int e = 0; e < n; e++) {
                REAL total = 0;
                for (int f = 0; f < n; f++) {
                    size_t ef = e * wide + f, lef = l * layer + ef;
                    REAL turned = slope[lef] * cosine[ef], both = wc[e] * w[f] + w[e] * wc[f];
                    sum += both * legendre[lef] + w[e] * w[f] * turned;
                    total += wc[f] * legendre[lef] + w[f] * turned;
                    d_cosine[ef] += d * (both * slope[lef] + w[e] * w[f] * curvature[lef] * cosine[ef]);
                    d_cosine_change[ef] += d * w[e] * w[f] * slope[lef];
                }
                d_weight[rows->first[i] + e] += 2 * d * total;
            }
            d_d_sum[i * degree + l] = sum;
        }
        turn(n, wide, d_cosine, direction, spare, d_direction + 3 * rows->first[i]);
        turn(n, wide, d_cosine_change, d_u, spare, d_direction + 3 * rows->first[i]);
    }
    free(legendre);
    return 0;
}

/* --- distances of all pairs of atoms ------------------------------------------------------------- */

enum { ATOMS = 16 };              /* rows of pairs that are taken at once */

typedef struct {
    int systems;
    long longest;                  /* atoms of the largest system */
    double tie;                    /* images whose distances differ by less are equally near */
    const long *natoms, *periodic; /* (systems,), and (systems, 3): which directions are */
    const double *lattice;         /* (systems, 3, 3), Minkowski-reduced */
    const double *inverse;
} Boxes;

/* What of a lattice is asked for each pair */
typedef struct {
    int periodic[3], any, tilted;
    double lattice[9], inverse[9], length[3], half, tie; /* half: of the shortest lattice vector */
} Lattice;

static Lattice lattice_of(const Boxes *boxes, int s)
{
    Lattice box = {.tie = boxes->tie, .half = 1e300};
    memcpy(box.lattice, boxes->lattice + 9 * s, sizeof(box.lattice));
    memcpy(box.inverse, boxes->inverse + 9 * s, sizeof(box.inverse));
    const double *a = box.lattice;
    for (int x = 0; x < 3; x++) {
        box.periodic[x] = boxes->periodic[3 * s + x] != 0;
        box.any |= box.periodic[x];
        box.length[x] = sqrt(a[3 * x] * a[3 * x] + a[3 * x + 1] * a[3 * x + 1] + a[3 * x + 2] * a[3 * x + 2]);
        if (box.periodic[x] && box.length[x] / 2 < box.half)
            box.half = box.length[x] / 2;
    }
    for (int x = 0; x < 3; x++)
        for (int y = 0; y < x; y++) {
            double along = a[3 * x] * a[3 * y] + a[3 * x + 1] * a[3 * y + 1] + a[3 * x + 2] * a[3 * y + 2];
            box.tilted |= fabs(along) > 1e-12 * box.length[x] * box.length[y];
        }
    return box;
}

/* The distance to the nearest image of an atom at v, the mean over equally near ones; unit (3) and
   turned (3, 3), if they are there: its derivatives by v and by the lattice. */
static double nearest(const Lattice *box, const double *v, double *unit, double *turned)
{
    double shift[3], at[3], found[27], shifts[27][3], images[27][3], least, mean = 0;
    int far = 0, count = 1, equal = 0;
    for (int x = 0; x < 3; x++) {
        double place = v[0] * box->inverse[x] + v[1] * box->inverse[3 + x] + v[2] * box->inverse[6 + x];
        shift[x] = box->periodic[x] ? -nearbyint(place) : 0;
        far |= box->periodic[x] && (0.5 - fabs(place + shift[x])) * box->length[x] < box->tie;
    }
    for (int x = 0; x < 3; x++)
        at[x] = v[x] + shift[0] * box->lattice[x] + shift[1] * box->lattice[3 + x] +
                shift[2] * box->lattice[6 + x];
    least = sqrt(at[0] * at[0] + at[1] * at[1] + at[2] * at[2]);
    memcpy(shifts[0], shift, sizeof(shift));
    memcpy(images[0], at, sizeof(at));
    found[0] = least;
    if (box->tilted ? least > box->half - box->tie : far)
        for (int a = -box->periodic[0]; a <= box->periodic[0]; a++)
            for (int b = -box->periodic[1]; b <= box->periodic[1]; b++)
                for (int c = -box->periodic[2]; c <= box->periodic[2]; c++) {
                    double *w = images[count], *step = shifts[count];
                    if (!a && !b && !c)
                        continue;
                    step[0] = shift[0] + a, step[1] = shift[1] + b, step[2] = shift[2] + c;
                    for (int x = 0; x < 3; x++)
                        w[x] = at[x] + a * box->lattice[x] + b * box->lattice[3 + x] +
                               c * box->lattice[6 + x];
                    found[count] = sqrt(w[0] * w[0] + w[1] * w[1] + w[2] * w[2]);
                    least = found[count] < least ? found[count] : least;
                    count++;
                }
    if (unit) {
        memset(unit, 0, 3 * sizeof(double));
        memset(turned, 0, 9 * sizeof(double));
    }
    for (int image = 0; image < count; image++) {
        if (found[image] > least && found[image] >= least + box->tie)
            continue;
        mean += found[image];
        equal++;
        for (int x = 0; unit && found[image] > 0 && x < 3; x++) {
            double share = images[image][x] / found[image];
            unit[x] += share;
            for (int y = 0; y < 3; y++)
                turned[3 * y + x] += shifts[image][y] * share;
        }
    }
    for (int x = 0; unit && x < 9; x++) {
        turned[x] /= equal;
        if (x < 3)
            unit[x] /= equal;
    }
    return mean / equal;
}

/* distance (systems, longest, longest) of the rows of atoms begin .. end, of the systems * longest that there
   are with padding; their positions x (3, systems * longest) */
int distance_forward(const Boxes *boxes, int begin, int end, const REAL *x, REAL *distance)
{
    const REAL *y = x + boxes->systems * boxes->longest, *z = y + boxes->systems * boxes->longest;
    for (int s = 0; s < boxes->systems; s++) {
        long start = s * boxes->longest, stop = start + boxes->natoms[s];
        Lattice box = lattice_of(boxes, s);
        for (long i = start > begin ? start : begin; i < stop && i < end; i++) {
            REAL *row = distance + (s * boxes->longest + i - start) * boxes->longest;
            for (long j = start; j < stop && !box.any; j++) {
                REAL a = x[j] - x[i], b = y[j] - y[i], c = z[j] - z[i];
                row[j - start] = sizeof(REAL) == 4 ? sqrtf(a * a + b * b + c * c)
                                                   : sqrt(a * a + b * b + c * c);
            }
            for (long j = start; j < stop && box.any; j++) {
                double v[3] = {(double)x[j] - x[i], (double)y[j] - y[i], (double)z[j] - z[i]};
                row[j - start] = nearest(&box, v, NULL, NULL);
            }
        }
    }
    return 0;
}

/* Its derivative, added to d_x (systems * longest, 3) of the rows begin .. end, and to d_lattice
   (systems * longest, 3, 3), whose sums over the atoms of a system are wanted. */
int distance_backward(const Boxes *boxes, int begin, int end, const REAL *x, const REAL *g,
                      double *d_x, double *d_lattice)
{
    const REAL *y = x + boxes->systems * boxes->longest, *z = y + boxes->systems * boxes->longest;
    long longest = boxes->longest;
    for (int s = 0; s < boxes->systems; s++) {
        long start = s * boxes->longest, stop = start + boxes->natoms[s];
        Lattice box = lattice_of(boxes, s);
        const REAL *own = g + s * longest * longest;
        for (long i = start > begin ? start : begin; i < stop && i < end; i += ATOMS)
            for (long j = start; j < stop; j++) /* some rows at once: g is read across, too */
                for (long r = i; r < i + ATOMS && r < stop && r < end; r++) {
                    REAL forth = own[(r - start) * longest + j - start];
                    REAL back = own[(j - start) * longest + r - start];
                    double v[3] = {(double)x[j] - x[r], (double)y[j] - y[r], (double)z[j] - z[r]};
                    double unit[3], turned[9];
                    if (box.any)
                        nearest(&box, v, unit, turned);
                    else {
                        double squared = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
                        double inverse = squared > 0 ? 1 / sqrt(squared) : 0;
                        for (int k = 0; k < 3; k++)
                            unit[k] = v[k] * inverse;
                    }
                    for (int k = 0; k < 3; k++)
                        d_x[3 * r + k] -= ((double)forth + back) * unit[k];
                    for (int k = 0; k < 9 && box.any; k++)
                        d_lattice[9 * r + k] += forth * turned[k];
                }
    }
    return 0;
}

/* --- node attention ---------------------------------------------------------------------------- */

/* Queries and keys are taken in tiles, so that nothing of size n x n is kept: of a row of weights
   only the logarithm of its sum. The logits' bias is one function of the distance for each head,
   read from a table of cubic polynomials. A tile has no fewer queries than keys. */
enum { QUERIES = 256, KEYS = 64, LANES = 4 };

/* the same numbers of LANES heads */
typedef REAL lanes __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));

typedef struct {
    int heads, size, systems;     /* size: channels of a head */
    long longest, intervals;      /* atoms of the largest system; rows of the table */
    double per_length;            /* intervals in 1 Angstrom */
    const long *first;            /* systems + 1: where the atoms of each begin */
    const REAL *distance;         /* (systems, longest, longest) */
    const REAL *table;            /* (intervals, heads / LANES rounded up, 4 coefficients, LANES) */
} Systems;

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* out[h][j] = y[j][h] */
LONG_LOOPS static void apart(const REAL *y, REAL *out, size_t step)
{
    for (size_t j = 0; j < KEYS; j++) {
        out[j] = y[LANES * j];
        out[step + j] = y[LANES * j + 1];
        out[2 * step + j] = y[LANES * j + 2];
        out[3 * step + j] = y[LANES * j + 3];
    }
}

/* bias[head][r][j] of a tile, -1e30 where there is no key; slope, if it is there: by x, the distance
   in intervals */
LONG_LOOPS static void read_table(const Systems *about, const REAL *distance, size_t rows, size_t keys,
                                  REAL *bias, REAL *slope)
{
    int sets = (about->heads + LANES - 1) / LANES, most = about->intervals - 1;
    REAL per = about->per_length, part[KEYS] = {0};
    lanes value[KEYS] = {{0}}, change[KEYS] = {{0}};
    int cell[KEYS];
    for (size_t r = 0; r < rows; r++) {
        const REAL *d = distance + r * about->longest;
        for (size_t j = 0; j < keys; j++) {
            REAL x = d[j] * per;
            cell[j] = x < most ? (int)x : most;
            part[j] = x - cell[j];
        }
        for (int set = 0; set < sets; set++) {
            size_t at = (size_t)set * LANES * QUERIES * KEYS + r * KEYS;
            for (size_t j = 0; j < keys; j++) {
                const lanes *c = (const lanes *)about->table + ((size_t)cell[j] * sets + set) * 4;
                REAL t = part[j];
                lanes y = c[3] * t + c[2], s = c[3] * t + y;
                y = y * t + c[1];
                value[j] = y * t + c[0];
                if (slope)
                    change[j] = s * t + y;
            }
            apart((const REAL *)value, bias + at, QUERIES * KEYS);
            if (slope)
                apart((const REAL *)change, slope + at, QUERIES * KEYS);
        }
        for (int h = 0; h < sets * LANES; h++)
            for (size_t j = keys; j < KEYS; j++)
                bias[(h * QUERIES + r) * KEYS + j] = -1e30;
    }
}

/* out[head][r][d] = factor x[r][head * size + d], n rows of `step` of them in x */
static void by_head(const Systems *about, size_t n, size_t room, const REAL *x, size_t step,
                    REAL factor, REAL *out)
{
    size_t size = about->size, wide = padded(size);
    for (int head = 0; head < about->heads; head++)
        for (size_t r = 0; r < n; r++)
            for (size_t d = 0; d < size; d++)
                out[(head * room + r) * wide + d] = factor * x[r * step + head * size + d];
}

/* the same of KEYS rows, transposed: out[head][d][j], 0 for j >= n */
static void by_channel(const Systems *about, size_t n, const REAL *x, size_t step, REAL *out)
{
    size_t size = about->size;
    for (int head = 0; head < about->heads; head++, out += size * KEYS)
        for (size_t d = 0; d < size; d++)
            for (size_t j = 0; j < KEYS; j++)
                out[d * KEYS + j] = j < n ? x[j * step + head * size + d] : 0;
}

/* Atoms begin .. end: out (N, heads*size) and total (N, heads), the logarithm of the sum of each
   row's exponentials, from qkv (N, 3*heads*size). Returns 0, or 1: no memory. */
int node_forward(const Systems *about, int begin, int end, const REAL *qkv, REAL *out, REAL *total)
{
    size_t size = about->size, heads = about->heads, hidden = heads * size, wide = padded(size);
    size_t sets = (heads + LANES - 1) / LANES, blocks = (about->longest + KEYS - 1) / KEYS;
    size_t tile = QUERIES * KEYS, held = heads * KEYS * wide;
    REAL *memory = numbers(2 * blocks * held + sets * LANES * tile + tile + QUERIES * (3 + wide) +
                           2 * heads * QUERIES * (wide + 1));
    if (!memory)
        return 1;
    REAL *keys = memory, *values = keys + blocks * held, *bias = values + blocks * held;
    REAL *weight = bias + sets * LANES * tile, *part = weight + tile, *q = part + QUERIES * wide;
    REAL *mixed = q + heads * QUERIES * wide, *largest = mixed + heads * QUERIES * wide;
    REAL *sum = largest + heads * QUERIES;
    REAL scale = 1 / sqrt((double)size);
    for (int s = 0; s < about->systems; s++) {
        size_t start = about->first[s], n = about->first[s + 1] - start;
        size_t from = start > (size_t)begin ? start : (size_t)begin;
        size_t to = smaller(start + n, end);
        if (from >= to)
            continue;
        for (size_t j = 0; j < n; j += KEYS) {
            const REAL *k = qkv + (start + j) * 3 * hidden + hidden;
            by_channel(about, smaller(KEYS, n - j), k, 3 * hidden, keys + j / KEYS * held);
            by_head(about, smaller(KEYS, n - j), KEYS, k + hidden, 3 * hidden, 1,
                    values + j / KEYS * held);
        }
        for (size_t i = from; i < to; i += QUERIES) {
            size_t rows = smaller(QUERIES, to - i);
            const REAL *distance = about->distance + (s * about->longest + i - start) * about->longest;
            by_head(about, rows, QUERIES, qkv + i * 3 * hidden, 3 * hidden, scale, q);
            memset(mixed, 0, heads * QUERIES * wide * sizeof(REAL));
            for (size_t r = 0; r < heads * QUERIES; r++)
                largest[r] = -1e30, sum[r] = 0;
            for (size_t j = 0; j < n; j += KEYS) {
                size_t count = smaller(KEYS, n - j);
                read_table(about, distance + j, rows, count, bias, NULL);
                for (size_t head = 0; head < heads; head++) {
                    const REAL *b = bias + head * tile;
                    REAL *own = mixed + head * QUERIES * wide, shrink[QUERIES];
                    product(rows, padded(count), size, q + head * QUERIES * wide, wide, 1,
                            keys + j / KEYS * held + head * size * KEYS, KEYS, weight, KEYS);
                    for (size_t r = 0; r < rows; r++) {
                        REAL *w = weight + r * KEYS, top = largest[head * QUERIES + r], added = 0;
                        for (size_t f = 0; f < padded(count); f++) {
                            w[f] += b[r * KEYS + f];
                            top = w[f] > top ? w[f] : top;
                        }
                        for (size_t f = 0; f < padded(count); f++) {
                            w[f] = exponential(w[f] - top);
                            added += w[f];
                        }
                        shrink[r] = exponential(largest[head * QUERIES + r] - top);
                        sum[head * QUERIES + r] = sum[head * QUERIES + r] * shrink[r] + added;
                        largest[head * QUERIES + r] = top;
                    }
                    product(rows, size, count, weight, KEYS, 1,
                            values + j / KEYS * held + head * KEYS * wide, wide, part, wide);
                    for (size_t r = 0; r < rows; r++)
                        for (size_t d = 0; d < wide; d++)
                            own[r * wide + d] = own[r * wide + d] * shrink[r] + part[r * wide + d];
                }
            }
            for (size_t r = 0; r < rows; r++)
                for (size_t head = 0; head < heads; head++) {
                    size_t at = head * QUERIES + r;
                    for (size_t d = 0; d < size; d++)
                        out[(i + r) * hidden + head * size + d] = mixed[at * wide + d] / sum[at];
                    total[(i + r) * heads + head] = largest[at] + log((double)sum[at]);
                }
        }
    }
    free(memory);
    return 0;
}

/* Its derivative: d_q (N, heads*size) and d_distance (as distance) are written for the rows
   begin .. end, d_kv (N, 2*heads*size) is added to, for all keys. */
int node_backward(const Systems *about, int begin, int end, const REAL *qkv, const REAL *out,
                  const REAL *total, const REAL *gradient, REAL *d_q, REAL *d_kv, REAL *d_distance)
{
    size_t size = about->size, heads = about->heads, hidden = heads * size, wide = padded(size);
    size_t sets = (heads + LANES - 1) / LANES, blocks = (about->longest + KEYS - 1) / KEYS;
    size_t tile = QUERIES * KEYS, held = heads * KEYS * wide, rowwise = heads * QUERIES * wide;
    REAL *memory = numbers(5 * blocks * held + 2 * sets * LANES * tile + 3 * tile + QUERIES * wide +
                           3 * rowwise + heads * QUERIES);
    if (!memory)
        return 1;
    REAL *keys = memory, *values = keys + blocks * held, *k_rows = values + blocks * held;
    REAL *dk = k_rows + blocks * held, *dv = dk + blocks * held, *bias = dv + blocks * held;
    REAL *slope = bias + sets * LANES * tile, *weight = slope + sets * LANES * tile;
    REAL *d_weight = weight + tile, *pull = d_weight + tile, *part = pull + tile;
    REAL *q = part + QUERIES * wide, *g = q + rowwise, *dq = g + rowwise, *mean = dq + rowwise;
    REAL scale = 1 / sqrt((double)size), per = about->per_length;
    for (int s = 0; s < about->systems; s++) {
        size_t start = about->first[s], n = about->first[s + 1] - start;
        size_t from = start > (size_t)begin ? start : (size_t)begin;
        size_t to = smaller(start + n, end);
        if (from >= to)
            continue;
        for (size_t j = 0; j < n; j += KEYS) {
            const REAL *k = qkv + (start + j) * 3 * hidden + hidden;
            by_channel(about, smaller(KEYS, n - j), k, 3 * hidden, keys + j / KEYS * held);
            by_channel(about, smaller(KEYS, n - j), k + hidden, 3 * hidden, values + j / KEYS * held);
            by_head(about, smaller(KEYS, n - j), KEYS, k, 3 * hidden, 1, k_rows + j / KEYS * held);
        }
        memset(dk, 0, 2 * blocks * held * sizeof(REAL));
        for (size_t i = from; i < to; i += QUERIES) {
            size_t rows = smaller(QUERIES, to - i);
            size_t row = (s * about->longest + i - start) * about->longest;
            by_head(about, rows, QUERIES, qkv + i * 3 * hidden, 3 * hidden, scale, q);
            by_head(about, rows, QUERIES, gradient + i * hidden, hidden, 1, g);
            memset(dq, 0, rowwise * sizeof(REAL));
            for (size_t r = 0; r < rows; r++)
                for (size_t head = 0; head < heads; head++) {
                    size_t at = (i + r) * hidden + head * size;
                    REAL along = 0;
                    for (size_t d = 0; d < size; d++)
                        along += gradient[at + d] * out[at + d];
                    mean[head * QUERIES + r] = along;
                }
            for (size_t j = 0; j < n; j += KEYS) {
                size_t count = smaller(KEYS, n - j), across = padded(count), block = j / KEYS * held;
                read_table(about, about->distance + row + j, rows, count, bias, slope);
                for (size_t head = 0; head < heads; head++) {
                    const REAL *b = bias + head * tile, *c = slope + head * tile;
                    REAL *own = dq + head * QUERIES * wide;
                    product(rows, across, size, q + head * QUERIES * wide, wide, 1,
                            keys + block + head * size * KEYS, KEYS, weight, KEYS);
                    product(rows, across, size, g + head * QUERIES * wide, wide, 1,
                            values + block + head * size * KEYS, KEYS, d_weight, KEYS);
                    for (size_t r = 0; r < rows; r++) {
                        REAL *w = weight + r * KEYS, *dw = d_weight + r * KEYS, *p = pull + r * KEYS;
                        REAL all = total[(i + r) * heads + head], m = mean[head * QUERIES + r];
                        for (size_t f = 0; f < across; f++) {
                            REAL logit = w[f] + b[r * KEYS + f] - all;
                            w[f] = exponential(logit < 0 ? logit : 0);
                            dw[f] = w[f] * (dw[f] - m); /* of the logit */
                        }
                        for (size_t f = 0; f < count; f++)
                            p[f] = per * dw[f] * c[r * KEYS + f] + (head ? p[f] : 0);
                    }
                    product(rows, size, count, d_weight, KEYS, 1, k_rows + block + head * KEYS * wide,
                            wide, part, wide);
                    for (size_t x = 0; x < rows * wide; x++)
                        own[x] += part[x];
                    product(count, size, rows, d_weight, 1, KEYS, q + head * QUERIES * wide, wide,
                            part, wide);
                    for (size_t x = 0; x < count * wide; x++)
                        dk[block + head * KEYS * wide + x] += part[x];
                    product(count, size, rows, weight, 1, KEYS, g + head * QUERIES * wide, wide, part,
                            wide);
                    for (size_t x = 0; x < count * wide; x++)
                        dv[block + head * KEYS * wide + x] += part[x];
                }
                for (size_t r = 0; r < rows; r++)
                    memcpy(d_distance + row + r * about->longest + j, pull + r * KEYS,
                           count * sizeof(REAL));
            }
            for (size_t r = 0; r < rows; r++)
                for (size_t head = 0; head < heads; head++)
                    for (size_t d = 0; d < size; d++)
                        d_q[(i + r) * hidden + head * size + d] =
                            scale * dq[(head * QUERIES + r) * wide + d];
        }
        for (size_t j = 0; j < n; j++)
            for (size_t head = 0; head < heads; head++)
                for (size_t d = 0; d < size; d++) {
                    size_t at = j / KEYS * held + (head * KEYS + j % KEYS) * wide + d;
                    d_kv[(start + j) * 2 * hidden + head * size + d] += dk[at];
                    d_kv[(start + j) * 2 * hidden + hidden + head * size + d] += dv[at];
                }
    }
    free(memory);
    return 0;
}

/* --- one row after the other, one number after the other ------------------------------------------ */

/* Rows begin .. end of `size` numbers: out = x / rms(x) w, and inverse[i] = 1 / rms(x) of each. */
int norm_forward(int begin, int end, int size, double eps, const REAL *x, const REAL *w, REAL *out,
                 REAL *inverse)
{
    for (size_t i = begin; i < (size_t)end; i++) {
        const REAL *xi = x + i * size;
        REAL *y = out + i * size, squares = 0, r;
        for (int d = 0; d < size; d++)
            squares += xi[d] * xi[d];
        r = inverse[i] = 1 / sqrt((double)squares / size + eps);
        for (int d = 0; d < size; d++)
            y[d] = xi[d] * r * w[d];
    }
    return 0;
}

/* Its derivative by x: with h = w g and r the inverse, r h - r^3/size (h.x) x. */
int norm_backward(int begin, int end, int size, const REAL *g, const REAL *x, const REAL *w,
                  const REAL *inverse, REAL *d_x)
{
    for (size_t i = begin; i < (size_t)end; i++) {
        const REAL *xi = x + i * size, *gi = g + i * size;
        REAL *y = d_x + i * size, r = inverse[i], along = 0;
        for (int d = 0; d < size; d++)
            along += w[d] * gi[d] * xi[d];
        along *= r * r / size;
        for (int d = 0; d < size; d++)
            y[d] = r * (w[d] * gi[d] - along * xi[d]);
    }
    return 0;
}

/* The normal distribution up to x, and its density times sqrt(2 pi); in float to 2e-7, by Abramowitz
   and Stegun's formula 7.1.26 for the error function. */
static inline REAL normal(REAL x, REAL *density)
{
    if (sizeof(REAL) == 8) {
        *density = exp(-x * x / 2);
        return erfc(-x * 0.70710678118654752) / 2;
    }
    REAL e = exponential(-x * x / 2);
    REAL t = 1 / (1 + 0.3275911f * 0.70710678f * (REAL)fabs(x)), p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    p = p * t * e / 2;
    *density = e;
    return x < 0 ? p : 1 - p;
}

static const REAL per_root = 0.39894228040143268; /* 1 / sqrt(2 pi) */

/* Numbers begin .. end: out = x N(x), N being the normal distribution. */
LONG_LOOPS int gelu_forward(int begin, int end, const REAL *x, REAL *out)
{
    for (int i = begin; i < end; i++) {
        REAL density;
        out[i] = x[i] * normal(x[i], &density);
    }
    return 0;
}

/* Its derivative times g. */
LONG_LOOPS int gelu_backward(int begin, int end, const REAL *x, const REAL *g, REAL *d_x)
{
    for (int i = begin; i < end; i++) {
        REAL density, below = normal(x[i], &density);
        d_x[i] = g[i] * (below + x[i] * density * per_root);
    }
    return 0;
}

/* The derivative's derivatives, by g and by x, times what comes back to it. */
LONG_LOOPS int gelu_twice(int begin, int end, const REAL *x, const REAL *g, const REAL *change,
                           REAL *d_g, REAL *d_x)
{
    for (int i = begin; i < end; i++) {
        REAL density, below = normal(x[i], &density);
        d_g[i] = change[i] * (below + x[i] * density * per_root);
        d_x[i] = change[i] * g[i] * density * per_root * (2 - x[i] * x[i]);
    }
    return 0;
}
