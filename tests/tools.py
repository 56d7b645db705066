"""What several test files need: a tiny T5, and batches of ids."""

import torch

from t5_small import EOS_ID, T5, T5Config


TINY = {
    "vocab_size": 30,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
}


def tiny_t5(seed=0, **changes):
    """A random T5 in eval mode, small, but positions, padding and context all matter to it."""
    torch.manual_seed(seed)
    return T5(T5Config(**{**TINY, **changes})).eval()


def ragged(lengths, low=3, high=30, seed=0):
    """Random ids from low to high - 1; each row ends in </s> and is filled up with padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        tokens = torch.randint(low, high, (length - 1,), generator=generator)
        rows.append(torch.cat([tokens, torch.tensor([EOS_ID])]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
