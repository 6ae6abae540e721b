"""`nemohybrid launch`: what is refused before anything starts, and what may stand in a script."""

import re
import shlex

import pytest

from nemohybrid.errors import ConfigError
from nemohybrid.launch import checks, slurm

CANARY = "canary-5f1c-9e"
KUBERNETES = ["kubernetes", "--image", "image:1", "--volume", "runs:/tmp", "--gpus-per-node", "2"]
SLURM = ["slurm", "--gpus-per-node", "2"]
TORCHRUN = ["torchrun", "--gpus-per-node", "2"]
LAUNCHERS = pytest.mark.parametrize("launcher", [SLURM, TORCHRUN, KUBERNETES], ids=lambda words: words[0])


@LAUNCHERS
def test_a_layout_that_does_not_fill_the_nodes_is_refused_before_it_waits(launch, small, launcher, empty_folder):
    code, out, err = launch(*launcher, "--", *small, "parallel.tensor=4")
    assert (code, out) == (1, "")
    assert "does not make the 2 processes" in err
    assert list(empty_folder.iterdir()) == []


@LAUNCHERS
def test_every_broken_rule_is_named_at_once(launch, small, launcher):
    code, _, err = launch(*launcher, "--dry-run", "--", *small, "optim.lrr=1", "parallel.data=x", "train.steps=0")
    assert code == 1
    for word in ("optim.lrr", "'optim.lr'", "parallel.data=x", "train.steps=0"):
        assert word in err


def test_the_ranks_of_a_node_are_known_to_the_rules(rendered, launch, small, monkeypatch):
    """Weights are cut within a node by default: with 2 ranks a node that is 2 of 4."""
    hybrid = ["train.global_batch=4", "parallel.data_mode=hybrid"]
    rendered(*SLURM, "--nodes", "2", "--", *small, *hybrid)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    rendered(*SLURM, "--nodes", "2", "--", *small, *hybrid)
    code, _, err = launch("slurm", "--nodes", "4", "--gpus-per-node", "1", "--dry-run", "--", *small, *hybrid)
    assert (code, "a node has one data rank" in err) == (1, True), err


@pytest.mark.parametrize(
    "words, message",
    [
        ([*SLURM, "--partition", "gpu;reboot"], "--partition 'gpu;reboot': not understood. Legal: "),
        ([*SLURM, "--mount", "/a:/b"], "there is no container"),
        ([*SLURM, "--logs", "a\nb"], "must be printable text in one line"),
        ([*TORCHRUN, "--nodes", "2"], "must know where to meet"),
        ([*TORCHRUN, "--rendezvous", "a:1"], "one machine meets by itself"),
        ([*KUBERNETES, "--name", "Mine"], "--name 'Mine': not understood. Legal: small letters"),
        (
            [*KUBERNETES, "--name", "2026"],
            "--name '2026': not understood. Legal: small letters, digits and -, at most 50, the first a",
        ),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, list) else "",
)
def test_what_no_script_can_hold_is_refused_with_what_can(launch, small, words, message):
    code, out, err = launch(*words, "--dry-run", "--", *small)
    assert (code, out) == (1, "")
    assert message in err


@pytest.mark.parametrize(
    "check, message",
    [
        (lambda: checks.seconds_of("tomorrow"), "--time 'tomorrow': no time of SLURM. Legal: minutes, "),
        (lambda: checks.seconds_of("1:2:3:4"), "no time of SLURM"),
        (lambda: checks.seconds_of("0"), "without a limit nothing asks the run to save"),
        (lambda: checks.room_to_save("5", 300), "--save-seconds 300: of 300 s of --time 5 not a minute would be left"),
        (
            lambda: checks.room_to_save("6:59", 300),
            "not a minute would be left to train. Legal: up to 299, or a longer --time",
        ),
        (lambda: checks.room_to_save("9-0", 70_000), "at most 65535 s ahead"),
        (lambda: checks.names("--partition", "a,,b"), "--partition 'a,,b'"),
        (lambda: checks.name("--account", "a b"), "--account 'a b'"),
        (lambda: checks.name("--name", "a\n#SBATCH"), "--name"),
        (lambda: checks.directive("--time=9", ["time"]), "--sbatch=--time=9: the script decides about --time. Legal"),
        (lambda: checks.directive("--tim=9", ["time"]), "--sbatch=--tim=9: the script decides about --time"),
        (lambda: checks.directive("--gpu-bind=single:1", slurm.taken(False)), "decides about --gpu-bind"),
        (lambda: checks.directive("--gres=gpu:4", slurm.taken(False)), "decides about --gres"),
        (lambda: checks.directive("--no-req", slurm.taken(False)), "decides about --no-requeue"),
        (lambda: checks.directive("--mem-per-gpu=9G", slurm.taken(True)), "decides about --mem-per-gpu"),
        (lambda: checks.directive("qos", []), "an option of sbatch in one word"),
        (lambda: checks.directive("--comment=a b", []), "an option of sbatch in one word"),
        (lambda: checks.directive("--comment=a\n", []), "an option of sbatch in one word"),
        (
            lambda: checks.image("a.sqsh"),
            "--container-image 'a.sqsh': without a / in front it is no file to pyxis. Legal: ./a.sqsh",
        ),
        (lambda: checks.mount("/a,b:/c"), "Legal: /SOURCE:/TARGET"),
        (lambda: checks.mount("/a"), "Legal: /SOURCE:/TARGET"),
        (lambda: checks.mount("/a:b"), "Legal: /SOURCE:/TARGET"),
        (lambda: checks.mount("a:/b"), "Legal: /SOURCE:/TARGET, ./SOURCE:/TARGET"),
        (lambda: checks.mount("/a:/b:bogus"), "with options as :ro+nosuid"),
        (lambda: checks.distinct("--mount", ["/a", "/b", "/a"]), "--mount: /a is given twice"),
        (
            lambda: checks.rendezvous("a:99999"),
            "--rendezvous 'a:99999': not understood. Legal: HOST:PORT, the port up to 65535",
        ),
        (lambda: checks.program("uv run python"), "--python 'uv run python': is one word to the script"),
        (lambda: checks.setup("absent.sh", look=True), "--setup 'absent.sh': no such file here"),
        (lambda: checks.setup("", look=False), "--setup '': must be printable text in one line"),
        (lambda: checks.volume("runs"), "Legal: CLAIM:/PATH"),
        (lambda: checks.volume("runs:a"), "Legal: CLAIM:/PATH"),
        (
            lambda: checks.on_a_volume("/run/a", None, ["/a", "/run/b"]),
            "run.dir=/run/a: /run/a would be lost with its container",
        ),
        (
            lambda: checks.on_a_volume("/runs/../a", None, ["/runs"]),
            "/a would be lost with its container. Legal: a folder in /runs",
        ),
        (lambda: checks.on_a_volume("run", "/w", ["/runs"]), "run.dir=run: /w/run would be lost"),
    ],
)
def test_every_form_is_checked(check, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check()


def test_what_is_right_is_taken_as_it_is(monkeypatch):
    checks.room_to_save("7:00", 300)
    for text in ("/a:/b", "./a:/b:ro", "/my data:/d:ro+nosuid+x-create=dir", "tmpfs:/t"):
        assert checks.mount(text) == text
    assert checks.program("/a b/python") == "/a b/python"
    assert checks.setup("env.sh", look=False) == "./env.sh"
    monkeypatch.setenv("HOME", "/home/me")
    assert checks.setup("~/env.sh", look=False) == "/home/me/env.sh"


def test_a_run_folder_on_a_volume_or_somewhere_in_an_image_is_taken():
    checks.on_a_volume("/runs/a", None, ["/data", "/runs/"])
    checks.on_a_volume("a", "/runs", ["/runs"])
    checks.on_a_volume("runs/a", None, ["/runs"])


@pytest.mark.parametrize("word", ["-m", "--cfg"])
def test_flags_of_hydra_are_no_overrides(launch, small, word):
    code, _, err = launch(*SLURM, "--dry-run", "--", *small, word)
    assert (code, f"{word} behind -- is no override" in err) == (1, True), err


@pytest.mark.parametrize(
    "text, seconds",
    [("30", 1800), ("1:30", 90), ("2:00:05", 7205), ("1-12", 129600), ("1-0:30", 88200), ("7-00:00:01", 604801)],
)
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert checks.seconds_of(text) == seconds


@LAUNCHERS
def test_a_secret_of_the_environment_stands_in_no_script(launch, rendered, small, launcher, monkeypatch):
    for variable in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, f"{CANARY}-{variable}")
    assert CANARY not in rendered(*launcher, "--", *small)
    code, out, err = launch(*launcher, "--dry-run", "--", *small, f"run.dir=/tmp/{CANARY}-HF_TOKEN")
    assert code == 1
    assert "the value of HF_TOKEN" in err
    assert CANARY not in out + err


@pytest.mark.parametrize(
    "words", [["--setup", f"{CANARY}'s"], ["--", f'run.dir="{CANARY}\'s"'], ["--", f"run.dir='{CANARY}\\'s'"]]
)
def test_a_secret_is_found_where_a_script_has_it_quoted(launch, small, words, empty_folder, monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", f"{CANARY}'s")
    (empty_folder / f"{CANARY}'s").touch()
    words = words if "--" in words else [*words, "--"]
    code, out, err = launch(*SLURM, "--dry-run", *words, *small[:-2], small[-1])
    assert (code, "the value of DB_PASSWORD" in err) == (1, True), err
    assert CANARY not in out + err


def test_a_secret_that_would_be_looked_up_on_the_nodes_is_refused(launch, small, monkeypatch):
    monkeypatch.setenv("GITHUB_PAT", CANARY)
    code, out, err = launch(*SLURM, "--dry-run", "--", *small, "run.name=${oc.env:GITHUB_PAT}")
    assert (code, "run.name=${oc.env:GITHUB_PAT}: would be saved with the run" in err) == (1, True), err
    assert CANARY not in out + err


def test_corpora_on_other_disks_are_not_looked_for_and_everything_else_is_checked(launch, rendered, small):
    absent = [*small, "data.bundled=null", "data.train=absent", "data.tokenizer=absent.json"]
    code, _, err = launch(*SLURM, "--dry-run", "--", *absent)
    assert (code, "absent.bin" in err) == (1, True), err
    far = ["data.valid=a/b", "init_from=c", "resume=d/step_00000001"]
    assert "    data.train=absent\n" in rendered(*SLURM, "--elsewhere", "--", *absent, *far)
    elsewhere = [*SLURM, "--elsewhere", "--dry-run", "--", *absent]
    faulty = ["resume=atuo", "data.tokenizer=bpe:1024", "data.split=[0]"]
    _, _, err = launch(*elsewhere, *faulty, "data.train={a: 1, ./a: 1}")
    for word in (*faulty, "is neither auto, never, nor a checkpoint folder", "a and ./a are the same corpus"):
        assert word in err
    _, _, err = launch(*elsewhere, "train.global_batch=3", "train.evaluate_every=2")
    assert ("train.global_batch=3" in err, "there is no validation data" in err) == (True, True), err
    words = ["data.bundled=shakespeare", "data.tokenizer=byt", "resume=7.5"]
    _, _, err = launch(*KUBERNETES, "--dry-run", "--", *absent, *words)
    for word in ("give either data.bundled or data.train, not both", "data.tokenizer=byt: no such file", "resume=7.5"):
        assert word in err
    _, _, err = launch(*KUBERNETES, "--dry-run", "--", *small, "data.bundled=null")
    assert "no training data" in err


def test_packages_of_a_container_are_not_looked_for_here(launch, rendered, small):
    fused = [*small, "optim.name=apex_adamw"]
    code, _, err = launch(*SLURM, "--dry-run", "--", *fused)
    assert (code, "apex is not installed" in err) == (1, True), err
    assert "optim.name=apex_adamw" in rendered(*SLURM, "--container-image", "i", "--", *fused)
    assert "optim.name=apex_adamw" in rendered(*KUBERNETES, "--", *fused)


@pytest.mark.parametrize("launcher, program", [(SLURM, "sbatch"), (KUBERNETES, "kubectl")])
def test_a_program_that_is_not_there_is_named(launch, small, launcher, program, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = launch(*launcher, "--", *small)
    assert (code, f"there is no {program} on PATH" in err) == (1, True), err


@LAUNCHERS
def test_a_script_says_by_which_command_it_was_written(rendered, small, launcher):
    text = rendered(*launcher, "--", *small)
    (line,) = re.findall(r"^# (nemohybrid launch .*)$", text, re.MULTILINE)
    assert shlex.split(line)[2:] == [*launcher, "--", *small]


def test_options_are_written_out(launch, small):
    """A script says by which command it was written, without `--dry-run`."""
    code, out, _ = launch(*SLURM, "--dry", "--", *small)
    assert (code, out) == (2, "")
