"""`nemohybrid`: finding a command, `params`, `train -m`, and `generate`."""

import pytest

from nemohybrid.__main__ import COMMANDS


def test_without_a_command_the_usage_is_shown_and_the_status_is_two(nemohybrid):
    code, out, _ = nemohybrid()
    assert code == 2
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_is_no_error(nemohybrid, word):
    code, out, _ = nemohybrid(word)
    assert code == 0
    assert all(command in out for command in COMMANDS)


def test_an_unknown_command_gets_a_suggestion(nemohybrid):
    code, _, err = nemohybrid("trian", "data=shakespeare")
    assert code == 2
    assert "'train'" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(nemohybrid, command):
    code, out, _ = nemohybrid(command, "--help")
    assert code == 0
    assert len(out) > 100


def test_the_module_is_the_command(fresh):
    done = fresh("-m", "nemohybrid", "params", "model=nemotron_h_8b")
    assert done.returncode == 0, done.stderr
    total = next(line for line in done.stdout.splitlines() if line.startswith("total"))
    assert total.split()[1:4] == ["52", "8,100,852,736", "8,100,852,736"]


def test_params_needs_no_data_and_checks_the_model(nemohybrid):
    code, _, err = nemohybrid("params", "model=nemotron_h_8b", "model.mamba_num_groups=7")
    assert code == 1
    assert "126, 133" in err


def test_params_of_a_misspelt_model_suggests(nemohybrid):
    code, _, err = nemohybrid("params", "model=nemotron_h_8")
    assert code == 1
    assert "'nemotron_h_8b'" in err


def test_params_names_the_layers_and_the_length(nemohybrid):
    _, out, _ = nemohybrid("params", "model=tiny_moe", "data.sequence_length=99")
    assert "sequence length 99" in out
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines() if line and line[0] in "ME*"}
    assert rows == {"M": "3", "E": "3", "*": "2"}


@pytest.mark.parametrize("where", [[], ["run.dir=out"]])
def test_a_sweep_of_two_values_makes_two_run_folders_and_nothing_else(nemohybrid, small, empty_folder, where):
    code, out, _ = nemohybrid("train", "-m", *small, *where, "optim.lr=1e-3,1e-4", "run.name=sweep")
    assert code == 0, out
    root = empty_folder / ("out" if where else "runs/sweep")
    assert {path.name for path in root.iterdir()} - {"multirun.yaml"} == {"0", "1"}
    assert {path.name for path in empty_folder.iterdir()} == {root.relative_to(empty_folder).parts[0]}
    configs = [(root / n / "config.yaml").read_text() for n in "01"]
    assert "lr: 0.001" in configs[0]
    assert "lr: 0.0001" in configs[1]
    assert all((root / n / "checkpoints" / "step_00000002").is_dir() for n in "01")


def test_a_wrong_value_in_a_sweep_ends_it_with_a_sentence(nemohybrid, small, empty_folder):
    code, _, err = nemohybrid("train", "-m", *small, "train.global_batch=0,2")
    assert code == 1
    assert "train.global_batch=0: must be at least 1" in err
    assert "Traceback" not in err


def test_sweeping_over_the_run_folder_is_refused(nemohybrid, small):
    code, _, err = nemohybrid("train", "-m", *small, "run.dir=a,b")
    assert code == 1
    assert "sweep over something else" in err


def test_a_sweep_value_without_the_flag_says_what_to_do(nemohybrid, small):
    code, _, err = nemohybrid("train", *small, "optim.lr=1e-3,1e-4")
    assert code == 1
    assert "--multirun" in err


@pytest.fixture
def trained(nemohybrid, small, empty_folder):
    code, _, err = nemohybrid("train", *small, "run.dir=run")
    assert code == 0, err
    return empty_folder / "run"


def test_generate_reads_run_folders_and_checkpoints_streams_and_batches(nemohybrid, trained):
    options = ["--max-new-tokens", "6", "--greedy", "--device", "cpu"]

    def text(*arguments: str) -> str:
        code, out, err = nemohybrid("generate", *arguments, *options)
        assert code == 0, err
        return out

    from_run = text("--checkpoint", str(trained), "--prompt", "ROMEO.")
    assert from_run.startswith("ROMEO.")
    assert text("--checkpoint", str(trained / "checkpoints" / "step_00000002"), "--prompt", "ROMEO.") == from_run
    assert text("--checkpoint", str(trained), "--prompt", "ROMEO.", "--no-stream") == from_run, "streaming changes text"
    batch = text("--checkpoint", str(trained), "--prompt", "ROMEO.", "--prompt", "A")
    assert from_run.rstrip("\n") in batch, "a longer neighbour changes what a row says"
    assert "----- 2 -----\nA" in batch


@pytest.mark.parametrize(
    "arguments, words",
    [(["--checkpoint", "nowhere"], "nowhere is neither"), (["--checkpoint", "run", "--top-p", "2"], "top-p 2.0")],
)
def test_generate_tells_errors_in_sentences(nemohybrid, arguments, words):
    code, _, err = nemohybrid("generate", *arguments, "--prompt", "x")
    assert code == 1
    assert words in err


def test_a_run_leaves_nothing_beside_its_folder(trained, empty_folder):
    assert [path.name for path in empty_folder.iterdir()] == ["run"]
    assert (trained / "config.yaml").is_file()


def test_a_folder_that_cannot_be_made_is_one_sentence(nemohybrid, small, empty_folder):
    (empty_folder / "file").write_text("")
    code, _, err = nemohybrid("train", *small, "run.dir=file/run")
    assert code == 1
    assert "file/run" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["WORLD_SIZE", "abc"], ["WORLD_SIZE", "0"]])
def test_a_senseless_world_size_is_one_sentence(nemohybrid, small, words, monkeypatch):
    monkeypatch.setenv(*words)
    code, _, err = nemohybrid("train", *small)
    assert (code, f"WORLD_SIZE={words[1]}" in err) == (1, True), err
