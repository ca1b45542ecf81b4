"""GMML corruption: the same statistics as a plain loop per image, bounded groups, one generator, errors."""

import dataclasses

import pytest
import torch

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining
from spcxr_hf.transforms.group_masking import GROUPS_PER_ROUND, Corrupted, GroupMasking
from training_scripts.benchmarks.speed import corrupt_one_by_one

DROP = GroupMasking(fill_modes=("noise",))
REPLACE = GroupMasking(fill_modes=("replace",))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, size: int = 112) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=generator(99))


def coverage(mask: torch.Tensor) -> torch.Tensor:
    return mask.float().mean(dim=(1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("masking", [DROP, REPLACE], ids=["drop", "replace"])
@pytest.mark.parametrize("align", [1, 16])
def test_coverage_has_mean_and_spread_of_a_plain_loop(masking, align):
    masking = dataclasses.replace(masking, align=align)
    batched = torch.cat([coverage(masking(images(250), generator(seed)).mask) for seed in range(8)])
    looped = coverage(corrupt_one_by_one(masking, images(2000), generator(0)).mask)
    assert len(batched) == len(looped) == 2000
    assert batched.mean().item() == pytest.approx(looped.mean().item(), abs=0.01)
    assert batched.std().item() == pytest.approx(looped.std().item(), abs=0.01)


def test_coverage_is_near_the_figures_of_the_reference_release():
    # 120 draws of the release at 224 px: drop covers 0.645 on average (0.51 to 0.76), replace 0.311.
    drop, replace = (coverage(masking(images(240, 224), generator()).mask) for masking in (DROP, REPLACE))
    assert drop.mean().item() == pytest.approx(0.645, abs=0.02)
    assert drop.min() > 0.48 and drop.max() < 0.82  # a last group may overshoot the target by its own area
    assert replace.mean().item() == pytest.approx(0.311, abs=0.02)


def test_both_kinds_are_equally_likely():
    covered = coverage(GroupMasking()(images(1000, 32), generator()).mask)
    # The shares of the two kinds do not overlap: replace ends just above 0.3, drop at 0.5 or more.
    assert (covered < 0.45).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_one_group_stays_within_its_largest_side():
    # A target of nearly nothing is met by the first group that covers any pixel at all.
    single = GroupMasking(fill_modes=("zeros",), mask_ratio=(1e-6, 1e-6), max_block_size=0.3)
    mask = single(torch.ones(300, 1, 40, 60), generator()).mask.squeeze(1)
    heights, widths = mask.any(dim=2).sum(dim=1), mask.any(dim=1).sum(dim=1)
    assert (heights.max(), widths.max()) == (12, 18)  # 0.3 of the height and of the width; reached among 300
    assert heights.min() == widths.min() == 1
    assert torch.equal(mask.sum(dim=(1, 2)), heights * widths)  # one filled rectangle each


def test_groups_start_anywhere_and_have_any_side():
    """Starts and sides are uniform, and what would lie outside the image is cut off; the means are by hand."""
    single = GroupMasking(fill_modes=("zeros",), mask_ratio=(1e-6, 1e-6), max_block_size=0.25)
    mask = single(images(4000, 32), generator(1)).mask.squeeze(1)
    start, side = torch.meshgrid(torch.arange(32.0), torch.arange(1.0, 9.0), indexing="ij")  # longest: 0.25 x 32
    expected = torch.minimum(side, 32 - start)
    for inside in (mask.any(dim=2), mask.any(dim=1)):  # rows, columns
        first, length = inside.float().argmax(dim=1).float(), inside.sum(dim=1).float()
        assert first.mean().item() == pytest.approx(15.5, abs=0.6)  # four standard errors
        assert (first.min(), first.max()) == (0, 31)
        assert length.mean().item() == pytest.approx(expected.mean().item(), abs=0.15)
        assert length[first < 24].std().item() == pytest.approx(2.29, abs=0.1)  # of 1 .. 8


def test_a_block_comes_whole_from_anywhere_in_the_image():
    position = torch.arange(24.0 * 24).reshape(1, 1, 24, 24).repeat(3000, 1, 1, 1)
    single = GroupMasking(fill_modes=("block",), mask_ratio=(1e-6, 1e-6), max_block_size=0.25)
    corrupted, mask = single(position, generator(2))
    shares = []
    for values, covered in zip(corrupted[:, 0].long(), mask[:, 0], strict=True):
        rows, columns = covered.any(dim=1).nonzero().flatten(), covered.any(dim=0).nonzero().flatten()
        block = values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        top, left = block[0, 0] // 24, block[0, 0] % 24
        height, width = block.shape
        assert top + height <= 24 and left + width <= 24
        assert torch.equal(block, (top + torch.arange(height))[:, None] * 24 + left + torch.arange(width))
        shares.append((top / (24 - height), left / (24 - width)))
    found = torch.tensor(shares)
    assert found.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.025)
    assert found.std(dim=0).tolist() == pytest.approx([0.30, 0.30], abs=0.015)  # of 0 .. 1 in some twenty steps
    assert (found.min(), found.max()) == (0, 1)


def test_aligned_groups_cover_whole_patches():
    mask = GroupMasking(align=16)(images(32), generator()).mask
    patches = mask.unflatten(2, (7, 16)).unflatten(4, (7, 16)).float().mean(dim=(3, 5))
    assert set(patches.unique().tolist()) == {0.0, 1.0}


def test_uncorrupted_pixels_stay_and_the_input_too():
    clean = images(16)
    before = clean.clone()
    corrupted, mask = GroupMasking(fill_modes=("noise", "zeros", "block", "replace"))(clean, generator())
    assert torch.equal(clean, before)
    assert torch.equal(corrupted[~mask], clean[~mask])
    assert (corrupted[mask] != clean[mask]).float().mean() > 0.9


def test_fill_with_noise_and_zeros():
    noise = DROP(images(8), generator())
    assert noise.pixel_values[noise.mask].mean().abs() < 0.02
    assert noise.pixel_values[noise.mask].std().item() == pytest.approx(1, abs=0.02)
    zeros = GroupMasking(fill_modes=("zeros",))(images(8), generator())
    assert (zeros.pixel_values[zeros.mask] == 0).all()


def test_fill_by_replacement_takes_the_same_place_of_another_image():
    clean = images(8)
    corrupted, mask = REPLACE(clean, generator())
    same_place = torch.where(mask, clean.roll(-1, dims=0), clean)
    assert torch.equal(corrupted, same_place)


@pytest.mark.parametrize("align", [1, 8])
def test_fill_with_blocks_moves_blocks_within_the_image(align):
    # Every pixel holds its own position, so a corrupted one tells where it came from.
    position = torch.arange(64 * 64, dtype=torch.float32).reshape(1, 1, 64, 64).repeat(4, 1, 1, 1)
    corrupted, mask = GroupMasking(fill_modes=("block",), align=align)(position, generator())
    moved = (corrupted - position).long()[:, 0]
    inside = mask[:, 0, :, 1:] & mask[:, 0, :, :-1]
    # Two neighbours in one block moved equally far; a border between two blocks lies between few of them.
    assert (moved[:, :, 1:] == moved[:, :, :-1])[inside].float().mean() > (0.85 if align > 1 else 0.7)
    assert corrupted.min() >= 0 and corrupted.max() < 64 * 64
    if align > 1:
        assert (moved % align == 0).all()


@pytest.mark.parametrize("align", [1, 16])
def test_memory_of_an_earlier_result_is_used_again(align):
    masking = GroupMasking(fill_modes=("noise", "block", "replace"), align=align)
    earlier = masking(images(8), generator(3))
    fresh = masking(images(8), generator(4))
    again = masking(images(8), generator(4), reuse=earlier)
    assert torch.equal(again.pixel_values, fresh.pixel_values) and torch.equal(again.mask, fresh.mask)
    assert again.pixel_values.data_ptr() == earlier.pixel_values.data_ptr()
    assert again.mask.data_ptr() == earlier.mask.data_ptr() and again.mask.dtype == torch.bool


def test_memory_that_does_not_fit_is_left_alone():
    earlier, clean = GroupMasking()(images(4), generator()), images(8)
    kept = earlier.pixel_values.clone()
    fresh, again = GroupMasking()(clean, generator(5)), GroupMasking()(clean, generator(5), reuse=earlier)
    assert torch.equal(again.pixel_values, fresh.pixel_values) and torch.equal(earlier.pixel_values, kept)
    with pytest.raises(SpcxrError, match="reuse holds the images"):  # they would be overwritten
        GroupMasking()(clean, generator(), reuse=Corrupted(clean, again.mask))


def test_every_image_has_the_same_chance_of_each_fill():
    batch, zeros = images(6, 16) + 5, torch.zeros(6)
    masking = GroupMasking(fill_modes=("zeros", "replace"), mask_ratio=(0.3, 0.3))
    for seed in range(400):
        corrupted, mask = masking(batch, generator(seed))
        zeros += ((corrupted == 0) & mask).flatten(1).any(dim=1)
    assert ((zeros / 400 - 0.5).abs() < 0.1).all()  # four standard deviations


def test_same_generator_same_result():
    first, again, other = (GroupMasking()(images(8), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.pixel_values, again.pixel_values) and torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, other.mask)


def test_global_random_state_is_not_touched():
    state = torch.get_rng_state()
    GroupMasking(fill_modes=("noise", "zeros", "block", "replace"))(images(8), generator())
    assert torch.equal(state, torch.get_rng_state())


def test_more_groups_than_one_round_holds():
    fine = GroupMasking(fill_modes=("zeros",), mask_ratio=(0.9, 0.9), max_block_size=0.1)
    mask = fine(images(4), generator()).mask
    assert coverage(mask).min() > 0.88
    smallest_number_of_groups = coverage(mask).min() * 112**2 / (0.1 * 112) ** 2
    assert smallest_number_of_groups > GROUPS_PER_ROUND / 2


@pytest.mark.parametrize("shape", [(2, 1, 64, 96), (2, 3, 32, 32), (5, 1, 16, 16)])
def test_any_shape(shape):
    pixels = torch.rand(shape, generator=generator())
    corrupted, mask = GroupMasking(align=16 if shape[2] % 32 == 0 else 1)(pixels, generator())
    assert corrupted.shape == pixels.shape
    assert mask.shape == (shape[0], 1, *shape[2:]) and mask.dtype == torch.bool


def test_inside_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = GroupMasking()(images(8), generator())
    outside = GroupMasking()(images(8), generator())
    assert torch.equal(inside.mask, outside.mask)


def test_loss_is_unchanged_by_whatever_happens_at_uncorrupted_pixels():
    torch.manual_seed(0)
    config = SpcxrConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32
    )
    model = SpcxrForPreTraining(config).eval()
    clean = images(4, 32)
    corrupted, mask = GroupMasking(fill_modes=("zeros",))(clean, generator())
    elsewhere = torch.where(mask, clean, 1e6)
    with torch.no_grad():
        losses = [model(corrupted, bool_masked_pos=mask, labels=labels).loss for labels in (clean, elsewhere)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fill_modes": ()}, "fill_modes must name"),
        ({"fill_modes": ("blur",)}, "blur"),
        ({"mask_ratio": (0.0, 0.5)}, r"mask_ratio\[0\]"),
        ({"mask_ratio": (0.5, 1.0)}, r"mask_ratio\[1\]"),
        ({"mask_ratio": (0.7, 0.5)}, "mask_ratio must rise"),
        ({"replace_ratio": 0.99}, "replace_ratio"),
        ({"replace_ratio": float("nan")}, "replace_ratio"),
        ({"max_block_size": 0.0}, "max_block_size"),
        ({"max_block_size": 1.5}, "max_block_size"),
        ({"align": 0}, "align"),
    ],
)
def test_extremes_are_refused(values, message):
    with pytest.raises(SpcxrError, match=message):
        GroupMasking(**values)


@pytest.mark.parametrize(
    ("pixels", "masking", "message"),
    [
        (torch.zeros(2, 32, 32), DROP, "B, C, H, W"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), DROP, "floating point"),
        (torch.zeros(0, 1, 32, 32), DROP, "got torch.float32"),
        (torch.zeros(2, 1, 30, 32), GroupMasking(align=16), "multiple of align"),
        (torch.zeros(1, 1, 32, 32), REPLACE, "at least 2"),
    ],
)
def test_unusable_batches_are_refused(pixels, masking, message):
    with pytest.raises(SpcxrError, match=message):
        masking(pixels, generator())
