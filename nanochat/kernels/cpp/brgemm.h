// PyTorch's small matrix product (oneDNN's brgemm): with AMX where the processor has it, else with AVX512. The functions are
// exported by libtorch_cpu and declared here, as torch's headers take long to compile. Pasted in like bf16.h, which comes before.

#include <cstring>
#include <exception>

namespace c10 {
struct BFloat16;
}

namespace at::native::cpublas {
// c (M, N) fp32 = a (M, K) b (K, N), added to c if `add`. b is packed in pairs of rows: [K / 2][N][2]. ld_*: from a row to the
// next, in elements (of b: in pairs). Throws where the product is not available.
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const c10::BFloat16* a,
            const c10::BFloat16* b, float* c, bool packed);
void brgemm_release(bool packed);  // a thread's tile registers, after its last product
}  // namespace at::native::cpublas

namespace {

inline void product(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t ld_a, const void* b, int64_t ld_b, float* c,
                    int64_t ld_c, bool add) {
    at::native::cpublas::brgemm(M, N, K, ld_a, ld_b, ld_c, add, (const c10::BFloat16*)a, (const c10::BFloat16*)b, c, true);
}

}  // namespace

// Whether the product works here. A message goes to `why`, of `size` bytes. To be called before any other function: an exception
// in a parallel region would end the process.
extern "C" int brgemm_works(char* why, int64_t size) {
    alignas(64) bf16 a[16 * 32], b[32 * 16];
    alignas(64) float c[16 * 16];
    for (auto& x : a) x = 0x3f80;  // 1
    for (auto& x : b) x = 0x4000;  // 2
    try {
        product(16, 16, 32, a, 32, b, 16, c, 16, false);
        at::native::cpublas::brgemm_release(true);
    } catch (const std::exception& e) {
        strncpy(why, e.what(), size - 1);
        return 0;
    }
    for (float x : c)
        if (x != 64) return strncpy(why, "its results are wrong", size - 1), 0;
    return 1;
}
