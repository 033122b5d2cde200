// Maps in channels_last into blocks, and back. Arguments: Maps. Zeros fill the last block of
// channels up; blocks' rows for images that there are not are left as they are.

// Calls body(map's channels, block's channels, how many) for each run of channels of one image and
// pixel that lies within a block.
template <typename T, typename Body>
static void for_runs(const Maps& m, int threads, const Body& body) {
  const int64_t groups = (m.images + rows - 1) / rows;
  const int64_t blocks = (m.channels + columns_of_block - 1) / columns_of_block;
  T *maps = static_cast<T*>(m.maps), *in_blocks = static_cast<T*>(m.blocks);
  parallel_for(groups * m.pixels, threads, [&](int64_t task) {
    const int64_t group = task / m.pixels, pixel = task % m.pixels;
    for (int row = 0; row < images_of(m.images, group); ++row) {
      T* map = maps + ((group * rows + row) * m.pixels + pixel) * m.channels;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t left = m.channels - b * columns_of_block;
        body(map + b * columns_of_block,
             in_blocks + (task * blocks + b) * block_size + row * columns_of_block,
             left < columns_of_block ? left : columns_of_block);
      }
    }
  });
}

template <typename T>
static void to_blocks_as(const Maps& m, int threads) {
  for_runs<T>(m, threads, [](const T* map, T* block, int64_t count) {
    if (count == columns_of_block) {  // a constant, of a few instructions
      std::memcpy(block, map, sizeof(T) * columns_of_block);
    } else {
      std::memcpy(block, map, sizeof(T) * count);
      std::memset(block + count, 0, sizeof(T) * (columns_of_block - count));
    }
  });
}

template <typename T>
static void from_blocks_as(const Maps& m, int threads) {
  for_runs<T>(m, threads, [](T* map, const T* block, int64_t count) {
    if (count == columns_of_block) {
      std::memcpy(map, block, sizeof(T) * columns_of_block);
    } else {
      std::memcpy(map, block, sizeof(T) * count);
    }
  });
}

static void to_blocks(const Maps& m, int threads) noexcept {
  m.dtype == DType::bf16 ? to_blocks_as<BF16>(m, threads) : to_blocks_as<float>(m, threads);
}

static void from_blocks(const Maps& m, int threads) noexcept {
  m.dtype == DType::bf16 ? from_blocks_as<BF16>(m, threads) : from_blocks_as<float>(m, threads);
}
