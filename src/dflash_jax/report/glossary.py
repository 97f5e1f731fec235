"""The words of a page and how each number is estimated."""

GLOSSARY = {
    "accept_len": "Leading drafted tokens of a block that equal the target's greedy tokens, 0 to B-1; the bonus token"
    " is not counted. The mean pools all anchors (micro).",
    "tau": "Tokens committed per target pass, 1 to B, bonus included: accept_len + 1 on blocks that decoding visits."
    " Micro: committed tokens divided by passes, pooled over prompts. Macro: the mean of per-prompt means.",
    "survival": "At slot k, the share of blocks with accept_len of at least k: everything up to slot k was right.",
    "token_acc": "Share of the B-1 drafted tokens equal to the label at the same slot, whatever came before them. It is"
    " higher than survival and does not predict speed.",
    "all anchors, chain": "All anchors: every labelled position of a response starts a block. Chain (replay): only the"
    " anchors that decoding would visit, a to a + accept_len + 1, from the first response token. Only it gives tau.",
    "bonus": "The target's own next token, which every pass yields for free after the accepted ones.",
    "95 % interval": "Percentile bootstrap over prompts, not over anchors: anchors of one prompt are not independent.",
    "offset": "position_offset, in reports ctx_pos_start: the absolute position of a sequence's first token. A shift of"
    " all positions changes nothing in exact arithmetic, so accept_len must not depend on it.",
    "paired difference": "accept_len at an offset minus accept_len at the smallest offset, anchor by anchor on the same"
    " tokens.",
    "holds, broken, undecided": "An equivalence test on the paired difference: it holds when the whole interval lies"
    " within the margin (0.1 accepted tokens), is broken when the interval leaves out 0 and its centre lies beyond the"
    " margin, and is undecided otherwise. Not finding a difference is not enough to say that there is none.",
    "feature drift": "How far the target's captured hidden states move with the offset, relative, root mean square. In"
    " exact arithmetic they do not move.",
    "link exchanged": "One link between text and acceptance (features, labels, positions, drafter) exchanged while all"
    " others stay: mended in the engine's chain, or spoiled in a sound one. The link that turns the outcome is to"
    " blame.",
    "seen, unseen": "Prompts that the drafter was trained on, and held-out ones, told apart by a hash of the prompt.",
    "held-out tau, best": "While training with `--eval-cache`: replay tau on prompts not trained on. `best` is the step"
    " of the highest one, so on these prompts it is flattered.",
    "explained by rounding": "Verification feeds a block at once, plain decoding a token at a time: the same sums,"
    " rounded otherwise. In bfloat16 a near tie may fall either way. A flip is explained where the margin between its"
    " two tokens is within what rounding alone moves a margin by, measured at the other tokens of that text. In float32"
    " none is excused.",
    "block_size B": "Positions per block, the anchor (its known first token) included: B-1 tokens are drafted.",
}
