/* Matrix products of small unsigned codes on one core: 8-bit dot products, bit planes, tables.
 *
 * All of them return C[m, n] = sum over k of a[m, k] * w[k, n] as int32. Activations are codes
 * 0..2^bits-1, weights too (int8 in `gemm_vnni`). N is a multiple of 64; what K must be a multiple
 * of is said at each. Offsets of codes (weights from -2 to 1, for instance) cost a row sum each and
 * are the same for all, so they are left out.
 */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Holds a sum in its register; gcc moves the sums of `tables_tile` to memory otherwise. */
#define KEEP(x) __asm__("" : "+v"(x))

/* Cuts M rows into blocks of at most MOST rows, all about the same size, and calls BODY(rows). */
#define BLOCKS(M, MOST, BODY)                                 \
    do {                                                      \
        int count_ = ((M) + (MOST)-1) / (MOST), at_ = 0;      \
        for (int b_ = 0; b_ < count_; b_++) {                 \
            int next_ = (int)((int64_t)(M) * (b_ + 1) / count_); \
            BODY(at_, next_ - at_);                           \
            at_ = next_;                                      \
        }                                                     \
    } while (0)

/* ---- 8 bits: vpdpbusd -------------------------------------------------------------------- */

INLINE void vnni_tile(const int rows, const uint8_t *a, const int8_t *w, int32_t *c, int N, int K) {
    __m512i acc[6][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++) acc[i][j] = _mm512_setzero_si512();
    for (int k = 0; k < K; k += 4, w += 256) {
        __m512i b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) b[j] = _mm512_load_si512(w + 64 * j);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            int32_t four;
            memcpy(&four, a + (int64_t)i * K + k, 4);
            __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], x, b[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++) _mm512_storeu_si512(c + (int64_t)i * N + 16 * j, acc[i][j]);
}

/* a: u8 [M, K]; w: s8 [N/64, K/4, 64, 4]; K % 4 == 0. */
void gemm_vnni(const uint8_t *a, const int8_t *w, int32_t *c, int M, int N, int K) {
    for (int n = 0; n < N; n += 64) {
        const int8_t *panel = w + (int64_t)n * K;
#define BODY(at, rows)                                                          \
    do {                                                                        \
        const uint8_t *x = a + (int64_t)(at) * K;                               \
        int32_t *y = c + (int64_t)(at) * N + n;                                 \
        switch (rows) {                                                         \
        case 1: vnni_tile(1, x, panel, y, N, K); break;                         \
        case 2: vnni_tile(2, x, panel, y, N, K); break;                         \
        case 3: vnni_tile(3, x, panel, y, N, K); break;                         \
        case 4: vnni_tile(4, x, panel, y, N, K); break;                         \
        case 5: vnni_tile(5, x, panel, y, N, K); break;                         \
        default: vnni_tile(6, x, panel, y, N, K);                               \
        }                                                                       \
    } while (0)
        BLOCKS(M, 6, BODY);
#undef BODY
    }
}

/* ---- Bit planes: and, vpopcntq, add ------------------------------------------------------- */

INLINE void planes_tile(const int rows, const uint64_t *a, const uint64_t *w, int32_t *c, int M,
                        int N, int words, int abits, int wbits) {
    __m512i acc[6][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++) acc[i][j] = _mm512_setzero_si512();
    /* The pairs of planes by falling weight: shift what is there, then add the next ones. */
    for (int power = abits + wbits - 2; power >= 0; power--) {
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < 4; j++) acc[i][j] = _mm512_slli_epi64(acc[i][j], 1);
        for (int p = 0; p < abits; p++) {
            int q = power - p;
            if (q < 0 || q >= wbits) continue;
            const uint64_t *x = a + (int64_t)p * M * words;
            const uint64_t *y = w + (int64_t)q * N * words;
            for (int k = 0; k < words; k++, y += 32) {
                __m512i b[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) b[j] = _mm512_load_si512(y + 8 * j);
#pragma GCC unroll 6
                for (int i = 0; i < rows; i++) {
                    __m512i bits = _mm512_set1_epi64((int64_t)x[(int64_t)i * words + k]);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++)
                        acc[i][j] = _mm512_add_epi64(
                            acc[i][j], _mm512_popcnt_epi64(_mm512_and_si512(bits, b[j])));
                }
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            _mm256_storeu_si256((__m256i *)(c + (int64_t)i * N + 8 * j),
                                _mm512_cvtepi64_epi32(acc[i][j]));
}

INLINE void planes_all(const uint64_t *a, const uint64_t *w, int32_t *c, int M, int N, int words,
                       int abits, int wbits) {
    for (int n = 0; n < N; n += 32) {
        const uint64_t *panel = w + (int64_t)n * words;
#define BODY(at, rows)                                                              \
    do {                                                                            \
        const uint64_t *x = a + (int64_t)(at) * words;                              \
        int32_t *y = c + (int64_t)(at) * N + n;                                     \
        switch (rows) {                                                             \
        case 1: planes_tile(1, x, panel, y, M, N, words, abits, wbits); break;      \
        case 2: planes_tile(2, x, panel, y, M, N, words, abits, wbits); break;      \
        case 3: planes_tile(3, x, panel, y, M, N, words, abits, wbits); break;      \
        case 4: planes_tile(4, x, panel, y, M, N, words, abits, wbits); break;      \
        case 5: planes_tile(5, x, panel, y, M, N, words, abits, wbits); break;      \
        default: planes_tile(6, x, panel, y, M, N, words, abits, wbits);            \
        }                                                                           \
    } while (0)
        BLOCKS(M, 6, BODY);
#undef BODY
    }
}

/* a: u64 [abits, M, K/64]; w: u64 [wbits, N/32, K/64, 32]; K % 64 == 0. */
void gemm_planes(const uint64_t *a, const uint64_t *w, int32_t *c, int M, int N, int K, int abits,
                 int wbits) {
    if (abits == 1 && wbits == 1) planes_all(a, w, c, M, N, K / 64, 1, 1);
    else if (abits == 2 && wbits == 1) planes_all(a, w, c, M, N, K / 64, 2, 1);
    else if (abits == 2 && wbits == 2) planes_all(a, w, c, M, N, K / 64, 2, 2);
    else planes_all(a, w, c, M, N, K / 64, abits, wbits);
}

/* ---- Tables of activations of at most 2 bits: vpermb ------------------------------------- */

/* Sums of six activations for each of the 64 patterns of a weight plane are at most 18, so that
 * 14 of them fit into a byte (42 at one bit). A table is the sum of two ready ones, each for three
 * activations. After that many groups the bytes go to 16-bit sums: `both` adds up byte pairs as
 * they are, `odd` their upper bytes. */
static uint8_t thirds_[2][64][64] __attribute__((aligned(64)));
static int thirds_ready_;

static void thirds(void) {
    if (thirds_ready_) return;
    for (int half = 0; half < 2; half++)
        for (int codes = 0; codes < 64; codes++)
            for (int pattern = 0; pattern < 64; pattern++) {
                int sum = 0;
                for (int i = 0; i < 3; i++)
                    if (pattern >> (3 * half + i) & 1) sum += codes >> (2 * i) & 3;
                thirds_[half][codes][pattern] = (uint8_t)sum;
            }
    thirds_ready_ = 1;
}

INLINE void spill(int32_t *c, __m512i both, __m512i odd) {
    __m512i even = _mm512_sub_epi16(both, _mm512_slli_epi16(odd, 8));
    int32_t *end = c;
    uint16_t e[32], o[32];
    _mm512_storeu_si512(e, even);
    _mm512_storeu_si512(o, odd);
    for (int i = 0; i < 32; i++) {
        end[2 * i] = e[i];
        end[2 * i + 1] = o[i];
    }
}

INLINE void tables_tile(const int rows, const int vectors, const int wbits, const uint8_t *a,
                        const uint8_t *w, int32_t *c, int N, int groups, int most) {
    const int width = vectors * wbits;
    __m512i both[8][4], odd[8][4];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) both[i][v] = odd[i][v] = _mm512_setzero_si512();
    for (int from = 0; from < groups; from += most) {
        int to = from + most < groups ? from + most : groups;
        __m512i acc[8][8];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
            for (int j = 0; j < width; j++) acc[i][j] = _mm512_setzero_si512();
        for (int g = from; g < to; g++, w += 64 * width) {
            __m512i index[8];
#pragma GCC unroll 8
            for (int j = 0; j < width; j++) index[j] = _mm512_load_si512(w + 64 * j);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                const uint8_t *x = a + (int64_t)i * 2 * groups + 2 * g;
                __m512i table = _mm512_add_epi8(_mm512_load_si512(thirds_[0][x[0]]),
                                                _mm512_load_si512(thirds_[1][x[1]]));
#pragma GCC unroll 8
                for (int j = 0; j < width; j++) {
                    acc[i][j] =
                        _mm512_add_epi8(acc[i][j], _mm512_permutexvar_epi8(index[j], table));
                    KEEP(acc[i][j]);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                __m512i low = acc[i][v * wbits], upper = _mm512_srli_epi16(low, 8);
                if (wbits == 2) {
                    __m512i high = acc[i][v * wbits + 1];
                    __m512i top = _mm512_srli_epi16(high, 8);
                    low = _mm512_add_epi16(low, _mm512_add_epi16(high, high));
                    upper = _mm512_add_epi16(upper, _mm512_add_epi16(top, top));
                }
                both[i][v] = _mm512_add_epi16(both[i][v], low);
                odd[i][v] = _mm512_add_epi16(odd[i][v], upper);
            }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++)
            spill(c + (int64_t)i * N + 64 * v, both[i][v], odd[i][v]);
}

#define TABLES(NAME, MOST, VECTORS, WBITS)                                                       \
    static void NAME(const uint8_t *a, const uint8_t *w, int32_t *c, int M, int N, int groups,   \
                     int most) {                                                                 \
        for (int n = 0; n < N; n += 64 * VECTORS) {                                              \
            const uint8_t *panel = w + (int64_t)n * groups * WBITS;                              \
            int count = (M + MOST - 1) / MOST;                                                   \
            for (int b = 0, at = 0; b < count; b++) {                                            \
                int next = (int)((int64_t)M * (b + 1) / count);                                  \
                const uint8_t *x = a + (int64_t)at * 2 * groups;                                 \
                int32_t *y = c + (int64_t)at * N + n;                                            \
                switch (next - at) {                                                             \
                case 1: tables_tile(1, VECTORS, WBITS, x, panel, y, N, groups, most); break;     \
                case 2: tables_tile(2, VECTORS, WBITS, x, panel, y, N, groups, most); break;     \
                case 3: tables_tile(3, VECTORS, WBITS, x, panel, y, N, groups, most); break;     \
                case 4: tables_tile(MOST > 3 ? 4 : 1, VECTORS, WBITS, x, panel, y, N, groups, most); break; \
                case 5: tables_tile(MOST > 4 ? 5 : 1, VECTORS, WBITS, x, panel, y, N, groups, most); break; \
                case 6: tables_tile(MOST > 5 ? 6 : 1, VECTORS, WBITS, x, panel, y, N, groups, most); break; \
                case 7: tables_tile(MOST > 6 ? 7 : 1, VECTORS, WBITS, x, panel, y, N, groups, most); break; \
                default: tables_tile(MOST, VECTORS, WBITS, x, panel, y, N, groups, most);        \
                }                                                                                \
                at = next;                                                                       \
            }                                                                                    \
        }                                                                                        \
    }
TABLES(tables_w1_v1, 8, 1, 1)
TABLES(tables_w1_v2, 8, 2, 1)
TABLES(tables_w1_v4, 5, 4, 1)
TABLES(tables_w2_v1, 8, 1, 2)
TABLES(tables_w2_v2, 5, 2, 2)

/* a: u8 [M, K/3], three codes of two bits in each; w: u8 [N/(64 V), K/6, V, wbits, 64], six bits
 * of a plane in each, V vectors together: 1, 2 or, with wbits 1, 4; K % 6 == 0; K < 7282. */
void gemm_tables(const uint8_t *a, const uint8_t *w, int32_t *c, int M, int N, int K, int abits,
                 int wbits, int vectors) {
    int most = abits == 1 ? 42 : 14;
    thirds();
    if (wbits == 1 && vectors == 1) tables_w1_v1(a, w, c, M, N, K / 6, most);
    else if (wbits == 1 && vectors == 2) tables_w1_v2(a, w, c, M, N, K / 6, most);
    else if (wbits == 1) tables_w1_v4(a, w, c, M, N, K / 6, most);
    else if (vectors == 1) tables_w2_v1(a, w, c, M, N, K / 6, most);
    else tables_w2_v2(a, w, c, M, N, K / 6, most);
}

/* ---- Tables of 8-bit activations ----------------------------------------------------------- */

/* A sum of six 8-bit activations takes 11 bits: two tables, of its lower 5 bits (at most 31) and of
 * its upper ones (at most 47), which can be added up 5 times in a byte. Tables of two rows at a
 * time are made anew and serve all columns. */
INLINE void tables8_tile(const int rows, const int wbits, const uint8_t *tables, const uint8_t *w,
                         int32_t *c, int N, int groups) {
    __m512i sum[2][2][4];
    for (int i = 0; i < rows; i++)
        for (int q = 0; q < wbits; q++)
            for (int h = 0; h < 4; h++) sum[i][q][h] = _mm512_setzero_si512();
    int32_t total[2][64];
    memset(total, 0, sizeof total);
    for (int outer = 0; outer < groups; outer += 240) {
        int end = outer + 240 < groups ? outer + 240 : groups;
        for (int from = outer; from < end; from += 5) {
            int to = from + 5 < end ? from + 5 : end;
            __m512i acc[2][2][2];
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                for (int q = 0; q < wbits; q++) acc[i][q][0] = acc[i][q][1] = _mm512_setzero_si512();
            for (int g = from; g < to; g++) {
                const uint8_t *x = w + (int64_t)g * wbits * 64;
#pragma GCC unroll 2
                for (int q = 0; q < wbits; q++) {
                    __m512i index = _mm512_load_si512(x + 64 * q);
#pragma GCC unroll 2
                    for (int i = 0; i < rows; i++) {
                        const uint8_t *t = tables + ((int64_t)g * 2 + i) * 128;
                        acc[i][q][0] = _mm512_add_epi8(
                            acc[i][q][0], _mm512_permutexvar_epi8(index, _mm512_load_si512(t)));
                        acc[i][q][1] = _mm512_add_epi8(
                            acc[i][q][1], _mm512_permutexvar_epi8(index, _mm512_load_si512(t + 64)));
                    }
                }
            }
#pragma GCC unroll 2
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                for (int q = 0; q < wbits; q++)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        sum[i][q][2 * h] = _mm512_add_epi16(sum[i][q][2 * h], acc[i][q][h]);
                        sum[i][q][2 * h + 1] = _mm512_add_epi16(
                            sum[i][q][2 * h + 1], _mm512_srli_epi16(acc[i][q][h], 8));
                    }
        }
        for (int i = 0; i < rows; i++)
            for (int q = 0; q < wbits; q++)
                for (int h = 0; h < 2; h++) {
                    int32_t part[64];
                    spill(part, sum[i][q][2 * h], sum[i][q][2 * h + 1]);
                    for (int j = 0; j < 64; j++) total[i][j] += part[j] << (q + 5 * h);
                    sum[i][q][2 * h] = sum[i][q][2 * h + 1] = _mm512_setzero_si512();
                }
    }
    for (int i = 0; i < rows; i++) memcpy(c + (int64_t)i * N, total[i], sizeof total[i]);
}

INLINE void tables8_make(const uint8_t *a, uint8_t *tables, int groups) {
    static const uint64_t patterns[6] = {0xaaaaaaaaaaaaaaaaULL, 0xccccccccccccccccULL,
                                         0xf0f0f0f0f0f0f0f0ULL, 0xff00ff00ff00ff00ULL,
                                         0xffff0000ffff0000ULL, 0xffffffff00000000ULL};
    for (int g = 0; g < groups; g++) {
        __m512i low = _mm512_setzero_si512(), high = low;
        for (int i = 0; i < 6; i++) {
            __m512i x = _mm512_set1_epi16(a[6 * g + i]);
            low = _mm512_mask_add_epi16(low, (__mmask32)patterns[i], low, x);
            high = _mm512_mask_add_epi16(high, (__mmask32)(patterns[i] >> 32), high, x);
        }
        __m512i mask = _mm512_set1_epi16(31);
        uint8_t *t = tables + (int64_t)g * 256;
        _mm256_store_si256((__m256i *)t, _mm512_cvtepi16_epi8(_mm512_and_si512(low, mask)));
        _mm256_store_si256((__m256i *)(t + 32), _mm512_cvtepi16_epi8(_mm512_and_si512(high, mask)));
        _mm256_store_si256((__m256i *)(t + 64), _mm512_cvtepi16_epi8(_mm512_srli_epi16(low, 5)));
        _mm256_store_si256((__m256i *)(t + 96), _mm512_cvtepi16_epi8(_mm512_srli_epi16(high, 5)));
    }
}

/* a: u8 [M, K]; w: u8 [N/64, K/6, wbits, 64], six bits of a plane in each; K % 6 == 0; scratch: u8
 * [K/6, 2, 2, 64], 64-byte aligned. */
void gemm_tables8(const uint8_t *a, const uint8_t *w, int32_t *c, int M, int N, int K, int wbits,
                  uint8_t *scratch) {
    int groups = K / 6;
    for (int m = 0; m < M; m += 2) {
        int rows = M - m < 2 ? 1 : 2;
        for (int i = 0; i < rows; i++)
            tables8_make(a + (int64_t)(m + i) * K, scratch + 128 * i, groups);
        for (int n = 0; n < N; n += 64) {
            const uint8_t *panel = w + (int64_t)n * groups * wbits;
            int32_t *y = c + (int64_t)m * N + n;
            if (rows == 2 && wbits == 1) tables8_tile(2, 1, scratch, panel, y, N, groups);
            else if (rows == 2) tables8_tile(2, 2, scratch, panel, y, N, groups);
            else if (wbits == 1) tables8_tile(1, 1, scratch, panel, y, N, groups);
            else tables8_tile(1, 2, scratch, panel, y, N, groups);
        }
    }
}

/* ---- What comes before and after a product ------------------------------------------------- */

/* Codes u8 [rows, K] to planes u64 [bits, rows, K/64]; K % 64 == 0. */
void pack_planes(const uint8_t *codes, uint64_t *planes, int rows, int K, int bits) {
    int64_t words = (int64_t)rows * (K / 64);
    for (int64_t i = 0; i < words; i++) {
        __m512i x = _mm512_loadu_si512(codes + 64 * i);
        for (int b = 0; b < bits; b++)
            planes[b * words + i] = _mm512_test_epi8_mask(x, _mm512_set1_epi8((char)(1 << b)));
    }
}

/* Codes u8 [rows, K] of at most two bits to u8 [rows, K/3], three in each; K % 6 == 0. */
void pack_thirds(const uint8_t *codes, uint8_t *out, int rows, int K) {
    uint8_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (uint8_t)(i / 4 * 3 + (i % 4 < 3 ? i % 4 : 0));
    __m512i by = _mm512_loadu_si512(order), weights = _mm512_set1_epi32(0x00100401);
    int64_t total = (int64_t)rows * K;
    for (int64_t k = 0; k < total; k += 48) {
        int64_t left = total - k;
        __mmask64 take = left >= 48 ? 0xffffffffffffULL : (1ULL << left) - 1;
        __mmask16 put = left >= 48 ? 0xffff : (__mmask16)((1u << (left / 3)) - 1);
        __m512i x = _mm512_permutexvar_epi8(by, _mm512_maskz_loadu_epi8(take, codes + k));
        x = _mm512_dpbusd_epi32(_mm512_setzero_si512(), x, weights);
        _mm512_mask_cvtepi32_storeu_epi8(out + k / 3, put, x);
    }
}

/* Rows of a product from a packed picture with a border: in u8 [count, side, side, bytes], out u8
 * [count, outs, outs, size, size, bytes]. Copies 64 bytes at a time; both need 64 bytes behind. */
void gather(const uint8_t *in, uint8_t *out, int count, int side, int outs, int stride, int size,
            int bytes) {
    int row = size * bytes;
    for (int p = 0; p < count; p++, in += (int64_t)side * side * bytes)
        for (int y = 0; y < outs; y++)
            for (int x = 0; x < outs; x++)
                for (int dy = 0; dy < size; dy++, out += row) {
                    const uint8_t *from =
                        in + ((int64_t)(y * stride + dy) * side + x * stride) * bytes;
                    for (int i = 0; i < row; i += 64)
                        _mm512_storeu_si512(out + i, _mm512_loadu_si512(from + i));
                }
}

/* Sums int32 [rows, N] to codes u8 [rows, N]: times scale[n], plus shift[n], rounded, 0..most. */
void requantize(const int32_t *sums, const float *scale, const float *shift, uint8_t *out, int rows,
                int N, int most) {
    __m512i top = _mm512_set1_epi32(most), zero = _mm512_setzero_si512();
    for (int i = 0; i < rows; i++)
        for (int n = 0; n < N; n += 16) {
            __m512 x = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + (int64_t)i * N + n));
            x = _mm512_fmadd_ps(x, _mm512_loadu_ps(scale + n), _mm512_loadu_ps(shift + n));
            __m512i y = _mm512_min_epi32(_mm512_max_epi32(_mm512_cvtps_epi32(x), zero), top);
            _mm_storeu_si128((__m128i *)(out + (int64_t)i * N + n), _mm512_cvtepi32_epi8(y));
        }
}

/* ---- The innermost instructions alone ------------------------------------------------------ */

#define REPEAT(STEP)                                      \
    for (int t = 0; t < times; t++) {                     \
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) { \
            STEP;                                         \
            __asm__ volatile("" : "+v"(x[i]));            \
        }                                                 \
    }

/* 12 * times steps in registers: 0 vpdpbusd; 1 and, vpopcntq, add; 2 vpermb, add. */
void instructions(int kind, int times) {
    __m512i x[12], y = _mm512_set1_epi8(7);
    KEEP(y);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) x[i] = _mm512_set1_epi8((char)i);
    if (kind == 0) {
        REPEAT(x[i] = _mm512_dpbusd_epi32(x[i], y, y))
    } else if (kind == 1) {
        REPEAT(x[i] = _mm512_add_epi64(x[i], _mm512_popcnt_epi64(_mm512_and_si512(x[i], y))))
    } else {
        REPEAT(x[i] = _mm512_add_epi8(x[i], _mm512_permutexvar_epi8(y, x[i])))
    }
}
