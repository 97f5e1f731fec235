"""The legend of array axes. Every array annotation of the package uses these words.

| axis | meaning |
|---|---|
| batch | sequences side by side |
| seq | tokens of a sequence, right-padded to a bucket |
| context | drafter context rows: tokens before an anchor |
| capacity | rows a KV cache has room for |
| query | tokens given to one forward |
| anchor | blocks drafted from one sequence |
| block | slots of a block, the anchor's own included (B) |
| drafted | slots 1..B-1 of a block |
| row | any flattened list of positions that meet the head |
| layer, hidden, intermediate, heads, kv_heads, head_dim, vocab | the model's own sizes |
| features | captured layers times hidden (K*H) |
"""
