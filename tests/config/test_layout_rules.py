"""How ranks may share a model and a batch: what is refused, what is named instead, and what published runs had."""

import pytest

from nemohybrid.config.context import attention_way, mamba_way
from nemohybrid.config.ranks import data_ranks, shard_ranks
from nemohybrid.config.run_config import RunConfig

TENSOR_RANKS = {  # of the recipes in Megatron-Bridge, docs of NVIDIA-NeMo/Nemotron, and the long-context phases
    "nemotron_h_4b": [1],
    "nemotron_h_8b": [2],
    "nemotron_h_47b": [8],
    "nemotron_h_56b": [2, 8],
    "nemotron_nano_v2_9b": [2],
    "nemotron_nano_v2_12b": [4, 8],
    "nemotron3_nano_4b": [1],
    "nemotron3_nano_30b": [1, 8],
    "nemotron3_5_lightning": [1],
    "nemotron3_super": [1, 2, 4, 8],
    "nemotron3_ultra": [1, 2, 4, 8],
}


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize("model, ranks", [(model, ranks) for model in TENSOR_RANKS for ranks in TENSOR_RANKS[model]])
def test_a_published_model_trains_on_its_published_tensor_ranks(model, ranks, compose):
    compose(f"model={model}", f"parallel.tensor={ranks}", "data.sequence_length=8192", world_size=ranks)


@pytest.mark.parametrize("model", TENSOR_RANKS)
def test_no_published_model_goes_over_more_tensor_ranks_than_it_has_mamba_groups(model, complaint):
    message = complaint(f"model={model}", "parallel.tensor=16", "data.sequence_length=8192", world_size=16)
    assert "parallel.tensor=16: 8 Mamba groups cannot be shared by it. Legal: parallel.tensor=1, 2, 4, 8" in message


def test_everything_that_does_not_divide_is_listed_at_once(complaint):
    message = complaint(
        "model=tiny_moe",
        'model.pattern="M-*E"',
        "model.ffn_hidden_size=100",
        "parallel.tensor=3",
        "parallel.data_mode=hybrid",
        "parallel.data_shard=3",
        "data.sequence_length=100",
        "train.global_batch=7",
        "logging.output_norms=1",
        world_size=12,
    )
    assert message.startswith("8 problems "), message
    for fault in (
        "2 Mamba groups and 8 Mamba heads",
        "4 query heads and 2 key/value heads",
        "100 channels of an MLP",
        "128 channels of an expert and 256 channels of the shared expert",
        "data.sequence_length=100: ",
        "logging.output_norms=1: ",
        "parallel.data_shard=3: 4 data ranks cannot be cut into parts of 3",
        "train.global_batch=7: cannot be shared by 4 data-parallel ranks",
    ):
        assert fault in message, f"{fault!r} is not in {message}"


@pytest.mark.parametrize("ranks, legal", [(2, True), (4, True), (6, False)])
def test_what_is_named_suits_all_layers(ranks, legal, compose, complaint):
    """Groups alone would allow 6 ranks, query heads 16."""
    sizes = ["model.mamba_num_groups=12", "model.mamba_num_heads=24", "model.num_attention_heads=16"]
    asked = [*sizes, "model.num_query_groups=2", f"parallel.tensor={ranks}", "data.sequence_length=240"]
    if legal:
        compose(*asked, world_size=ranks)
    else:
        assert complaint(*asked, world_size=ranks).endswith("cannot be shared by it. Legal: parallel.tensor=1, 2, 4")


@pytest.mark.parametrize("ranks, legal", [(2, True), (3, False), (4, True), (8, True), (12, True), (24, True)])
def test_key_value_heads_are_cut_or_repeated(ranks, legal, compose, complaint):
    sizes = ['model.pattern="*"', "model.num_attention_heads=24", "model.num_query_groups=4"]
    asked = [*sizes, f"parallel.tensor={ranks}", "data.sequence_length=240"]
    if legal:
        compose(*asked, world_size=ranks)
    else:
        assert "3: 4 key/value heads cannot be shared by it. Legal: parallel.tensor=1, 2, 4" in complaint(
            *asked, world_size=ranks
        )


def test_layers_of_an_mtp_block_count(complaint):
    message = complaint('model.pattern="-/M/M"', "parallel.tensor=4", world_size=4)
    assert "2 Mamba groups" in message


def test_a_vocabulary_need_not_divide(compose):
    compose("data.tokenizer=byte", "model.vocab_size=257", "parallel.tensor=2", world_size=2)


def test_only_sequence_parallelism_asks_for_a_length(compose):
    compose("parallel.tensor=2", "data.sequence_length=65", "parallel.sequence=false", world_size=2)
    compose("parallel.tensor=2", "data.sequence_length=66", world_size=2)


@pytest.mark.parametrize(
    "tensor, legal", [(1, "1, 2, 4, 8, 16, 32, 64, 128"), (4, "1, 2, 4, 8, 16, 32"), (8, "1, 2, 4, 8, 16")]
)
def test_context_ranks_share_the_mamba_heads_of_a_tensor_rank(tensor, legal, complaint):
    words = ["model=nemotron3_super", f"parallel.tensor={tensor}", "parallel.context=3"]
    message = complaint(*words, "parallel.context_method=all_to_all")
    assert f"{128 // tensor} Mamba heads and {8 // tensor} groups of a tensor rank" in message
    assert f"a tensor rank cannot be shared by it. Legal: parallel.context={legal};" in message


def test_context_ranks_need_a_multiple_or_a_divisor_of_the_groups(complaint):
    sizes = ["model.mamba_num_heads=24", "model.mamba_num_groups=4", "data.sequence_length=240"]
    message = complaint(*sizes, "parallel.context=6", "parallel.context_method=ring+all_to_all")
    assert "24 Mamba heads and 4 groups" in message, "6 divides the heads but not the groups"
    assert "Legal: parallel.context=1, 2, 4, 8, 12, 24" in message


@pytest.mark.parametrize(
    "words, ways",
    [
        (
            ["model=nemotron_h_8b", "data.sequence_length=8192"],
            ("heads", "states"),
        ),  # 8 query heads for each key/value head
        (["model=nemotron_h_8b", "data.sequence_length=8192", "parallel.tensor=8"], ("heads", "states")),
        (["model=nemotron_h_8b", "data.sequence_length=64"], ("heads", "heads")),  # a state weighs more than 32 tokens
        (["model=nemotron_h_8b", "data.sequence_length=448"], ("heads", "heads")),
        (  # one group, that both ranks need
            ["model=nemotron_h_8b", "data.sequence_length=448", "parallel.tensor=8"],
            ("heads", "states"),
        ),
        (["model=tiny"], ("heads", "states")),
        (["model=tiny", "model.num_attention_heads=5", "model.num_query_groups=1"], ("ring", "states")),
        (["model=tiny", "parallel.context_method=ring+all_to_all"], ("ring", "heads")),
    ],
)
def test_how_context_ranks_share_is_chosen_by_what_is_sent(words, ways, compose):
    world = 2 * (8 if "parallel.tensor=8" in words else 1)
    config = compose(*words, "parallel.context=2", "train.global_batch=2", world_size=world)
    assert (attention_way(config), mamba_way(config)) == ways


def test_a_batch_is_shared_by_data_ranks(complaint, compose):
    assert "train.global_batch=6, 9" in complaint("train.global_batch=8", world_size=3)
    compose("train.global_batch=9", world_size=3)


def test_tensor_ranks_do_not_share_the_batch(complaint, compose):
    assert "train.global_batch=6, 8" in complaint("train.global_batch=7", "parallel.tensor=2", world_size=4)
    compose("train.global_batch=6", "parallel.tensor=2", "train.microbatch=3", world_size=4)
    ramp = ["train.batch_ramp.start=2", "train.batch_ramp.increment=2", "train.global_batch=6"]
    compose(*ramp, "parallel.tensor=2", world_size=4)


def test_the_world_must_be_filled(complaint, compose):
    assert "start 4 processes" in complaint("parallel.data=4", world_size=2)
    assert "start 4 processes" in complaint("parallel.data=2", "parallel.tensor=2", world_size=2)
    compose("parallel.data=2", world_size=2)
    compose("parallel.data=2", "parallel.tensor=2", world_size=4)


@pytest.mark.parametrize("shard, same", [(1, "replicate"), (8, "full_shard")])
def test_a_hybrid_of_one_part_or_one_copy_is_called_what_it_is(shard, same, complaint):
    message = complaint("parallel.data_mode=hybrid", f"parallel.data_shard={shard}", world_size=8)
    assert f"parallel.data_shard={shard}: with 8 data ranks it means parallel.data_mode={same}." in message
    assert message.endswith("Legal: parallel.data_shard=2, 4; Legal: parallel.data_mode=full_shard, replicate")


@pytest.mark.parametrize("shard", [2, 4])
def test_a_hybrid_of_several_copies_and_parts_is_legal(shard, compose):
    config = compose("parallel.data_mode=hybrid", f"parallel.data_shard={shard}", "parallel.tensor=2", world_size=16)
    assert (data_ranks(config, 16), shard_ranks(config, 16)) == (8, shard)


def test_a_node_must_divide_the_data_ranks(complaint, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10")
    message = complaint("parallel.data_mode=hybrid", "parallel.tensor=4", "model.mamba_num_groups=4", world_size=20)
    assert "parallel.data_mode=hybrid: 5 data ranks cannot be cut into parts of 2, as many as a node has" in message


@pytest.mark.parametrize(
    "mode, shard, tensor, on_a_node, expected",
    [
        ("full_shard", None, 2, "4", 8),
        ("shard_grad", None, 1, "4", 16),
        ("replicate", None, 2, "4", 1),
        ("hybrid", 4, 2, "4", 4),
        ("hybrid", None, 1, "4", 4),
        ("hybrid", None, 2, "4", 2),
        ("hybrid", None, 8, "4", 1),  # less than one data rank is on a node
        ("hybrid", None, 2, None, 8),
    ],
)
def test_over_how_many_data_ranks_weights_are_cut(mode, shard, tensor, on_a_node, expected, monkeypatch):
    if on_a_node:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_a_node)
    config = RunConfig()
    config.parallel.data_mode, config.parallel.data_shard, config.parallel.tensor = mode, shard, tensor
    assert shard_ranks(config, world_size=16) == expected


def test_a_mistyped_mode_is_answered_with_the_right_ones(complaint):
    assert "full_shard, shard_grad, hybrid, replicate" in complaint("parallel.data_mode=fullshard")


def test_every_tensor_rank_needs_a_row_of_the_vocabulary(complaint):
    small = ["data.bundled=null", "data.train=somewhere", "model.vocab_size=3", "parallel.tensor=4"]
    message = complaint(*small, "model.num_attention_heads=4", "model.mamba_num_groups=4", world_size=4)
    assert "parallel.tensor=4: has more ranks than the vocabulary of 3 has rows" in message
    assert "parallel.tensor=up to 3" in message


def test_a_node_whose_ranks_all_share_matrices_has_nothing_to_cut(complaint, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    message = complaint("parallel.data_mode=hybrid", "parallel.tensor=4", "model.mamba_num_groups=4", world_size=16)
    assert "parallel.data_mode=hybrid: a node has one data rank, so that nothing would be cut" in message
