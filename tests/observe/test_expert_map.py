"""The map of expert loads: what its colours mean."""

import matplotlib.image
import numpy as np

from nemohybrid.observe.expert_map import draw_expert_map, relative_load


def test_loads_are_told_from_the_mean_of_their_layer():
    got = relative_load([[10, 20, 5, 5], [0, 0, 0, 8], [0, 0, 0, 0]])
    want = [[0.0, 1.0, -1.0, -1.0], [-np.inf, -np.inf, -np.inf, 2.0], [-np.inf] * 4]
    np.testing.assert_array_equal(got, want)


def test_the_picture_shows_busy_idle_and_dead_experts(tmp_path):
    """Two layers of 64: one balanced but for a busy expert and a dead one, one with all its load on the first half."""
    even = [10] * 62 + [40, 0]
    draw_expert_map(["layers.1", "mtp.0.layers.1"], [even, [20] * 32 + [0] * 32], tmp_path / "map.png", "run: step 5")
    pixels = matplotlib.image.imread(tmp_path / "map.png")[..., :3]
    spread = pixels.max(-1) - pixels.min(-1)
    black = (pixels.max(-1) < 0.01).mean()
    red = ((pixels[..., 0] > pixels[..., 2] + 0.3) & (spread > 0.3)).mean()
    assert black > 0.1, "the experts nobody visited are not black"
    assert red > 0.1, "the experts with twice the load are not red"
    draw_expert_map(["layers.1"], [[10] * 64], tmp_path / "even.png", "run: step 5")
    pixels = matplotlib.image.imread(tmp_path / "even.png")[:, : pixels.shape[1] * 3 // 4, :3]  # without the colour bar
    assert (pixels.max(-1) < 0.01).mean() < 0.05
    assert (pixels.max(-1) - pixels.min(-1)).max() < 0.05, "a balanced layer has a colour"
