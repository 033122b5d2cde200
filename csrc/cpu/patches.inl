// The images as blocks of patches, normalised, so that the first convolution is a product; and the
// gradient back:
//   out[g, p, n, k] = scale[k] x[16 g + n, offsets[p, k]] + shift[k], 0 where the offset is -1
//   grad[b, e] = sum over j of scale[e] patches[b's group, offsets[j, e]], in fp32
// Arguments: Patches and PatchesBackward.
template <typename T>
static void patches_as(const Patches& a, int threads) {
  T* out = static_cast<T*>(a.out);
  const int64_t groups = (a.batch + rows - 1) / rows, blocks = a.size / columns_of_block;
  parallel_for(groups * a.pixels, threads, [&](int64_t task) {
    const int64_t g = task / a.pixels, p = task % a.pixels;
    for (int64_t k = 0; k < a.size; k += W) {
      I offset;
      std::memcpy(&offset, a.offsets + p * a.size + k, sizeof offset);
      const F by = load(a.scale + k), plus = load(a.shift + k);
      T* block = out + (task * blocks + k / columns_of_block) * block_size + k % columns_of_block;
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t b = g * rows + n;
        F v = {};
        if (b < a.batch)
          v = offset < 0 ? v : fma(gather(a.x + b * a.image_stride, offset), by, plus);
        put(block + n * columns_of_block, v);
      }
    }
  });
}

template <typename T>
static void patches_backward_as(const PatchesBackward& a, int threads) {
  const int64_t elements = a.elements;
  parallel_for(a.batch, threads, [&](int64_t b) {
    const T* image = static_cast<const T*>(a.patches) + b / rows * a.image_size * rows +
                     b % rows * columns_of_block;
    for (int64_t e = 0; e < elements; e += W) {
      F sum = {};
      for (int64_t j = 0; j < a.terms; ++j) {
        I offset = I{} - 1;
        const int64_t left = elements - e < W ? elements - e : W;
        std::memcpy(&offset, a.offsets + j * elements + e, left * sizeof(int32_t));
        sum += gather(image, offset);
      }
      store_head(a.grad + b * elements + e, sum * load_head(a.scale + e, elements - e),
                 elements - e);
    }
  });
}

static void patches(const Patches& a, int threads) noexcept {
  a.dtype == DType::bf16 ? patches_as<BF16>(a, threads) : patches_as<float>(a, threads);
}

static void patches_backward(const PatchesBackward& a, int threads) noexcept {
  a.dtype == DType::bf16 ? patches_backward_as<BF16>(a, threads)
                         : patches_backward_as<float>(a, threads);
}
