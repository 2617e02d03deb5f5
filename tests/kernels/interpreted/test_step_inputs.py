"""What the kernel looks up for each token of a step, beside its torch twin."""

import torch

from fusewire.kernels.step_inputs import _expand_inputs_reference, expand_inputs

BLOCK_SIZE = 4
SEATS, TOKENS, BLOCKS = 6, 40, 10


def test_kernel_and_twin_look_up_the_same():
    generator = torch.Generator().manual_seed(0)
    records = torch.randint(0, 1000, (SEATS + 1, 3 + BLOCKS + TOKENS), generator=generator, dtype=torch.int32)
    count = 300
    seats = torch.arange(count, dtype=torch.int32) % (SEATS + 1)
    positions = torch.randint(0, TOKENS, (count,), generator=generator, dtype=torch.int32)
    positions[seats == SEATS] = 0
    new_blocks = torch.full((count,), -1, dtype=torch.int32)
    for token in range(SEATS):  # each seat grows by one block, at one of its tokens
        new_blocks[token] = 5000 + token
        others = (seats == token) & (positions // BLOCK_SIZE == positions[token] // BLOCK_SIZE)
        positions[others & (torch.arange(count) != token)] = (positions[token] + BLOCK_SIZE) % TOKENS
    found = []
    for way in (expand_inputs, _expand_inputs_reference):
        mine = records.clone()
        outputs = (torch.empty_like(seats), *(torch.empty(count, dtype=torch.int64) for _ in range(2)))
        tables, tokens = mine[:, 3 : 3 + BLOCKS], mine[:, 3 + BLOCKS :]
        way(seats, positions, new_blocks, tokens, tables, BLOCK_SIZE, *outputs)
        found.append((mine, *outputs))
    for ours, twins in zip(*found, strict=True):
        assert torch.equal(ours, twins)
    _, ids, at, slots = found[0]
    assert torch.equal(at, positions.long())
    assert torch.equal(ids, records[seats.long(), 3 + BLOCKS + positions.long()])
    assert (slots[seats == SEATS] == -1).all()
    assert slots[0] == 5000 * BLOCK_SIZE + positions[0] % BLOCK_SIZE
