import numpy as np

from dflash_jax.importer.llama import unpermute


def test_unpermute_is_as_drawn():
    # Two heads of six rows; the numbers are Hugging Face's rows of each head (10 + row in the second).
    gguf_rows = np.array([0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15], np.float32)
    weight = np.stack([gguf_rows, 100 + gguf_rows], axis=1)
    rows = np.array([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15], np.float32)
    np.testing.assert_array_equal(unpermute(weight, heads=2), np.stack([rows, 100 + rows], axis=1))
