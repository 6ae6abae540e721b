"""The picture is well-formed, the same every time, and shows every pass of every rank."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nemohybrid.config.compose import load_model_config
from nemohybrid.plan.gantt import svg
from nemohybrid.plan.pipeline import PipelinePlan, plan_pipeline

SVG = "{http://www.w3.org/2000/svg}"


def planned(*words: str, microbatches: int = 4) -> PipelinePlan:
    return plan_pipeline(load_model_config(["model=tiny_latent_mtp", *words]), microbatches)


def drawn(plan: PipelinePlan) -> ElementTree.Element:
    return ElementTree.fromstring(svg(plan))


CASES = {
    "1f1b": ["parallel.pipeline=2"],
    "interleaved": ['model.pattern="(ME*-)x3/*E/*E"', "parallel.pipeline=2", "parallel.virtual_pipeline=3"],
    "gpipe, empty ends": ['model.pattern="|M|E|"', "parallel.pipeline=4", "parallel.schedule=gpipe"],
    "one rank": [],
}


@pytest.mark.parametrize("case", CASES)
def test_every_pass_is_a_rectangle_within_the_step(case):
    plan = planned(*CASES[case])
    root = drawn(plan)
    for name in ("f", "b"):
        for turn in range(len(plan.segments[0])):
            # The legend has one of each, without a title.
            shown = [r for r in root.iter(f"{SVG}rect") if r.get("class") == f"{name}{turn}"]
            passes = [r for r in shown if r.find(f"{SVG}title") is not None]
            assert len(passes) == plan.microbatches * plan.ranks
            assert all(70 <= float(r.get("x", 0)) <= 70 + 1200 for r in passes)
            assert all(float(r.get("x", 0)) + float(r.get("width", 0)) <= 70 + 1200.01 for r in passes)


def test_it_says_what_it_shows():
    plan = planned(*CASES["interleaved"])
    texts = [text.text or "" for text in drawn(plan).iter(f"{SVG}text")]
    title = texts[0]
    assert title.startswith(f"{plan.name}, interleaved, 3 stages a rank, 4 microbatches: ranks wait ")
    assert {"rank 0", "rank 1", "forward", "backward"} <= set(texts)
    assert [t for t in texts if t.endswith("% idle")] == [f"{100 * idle:.1f} % idle" for idle in plan.timeline.idle]
    assert "".join(t for t in texts if t in tuple("M*-E")) == plan.pattern.main
    assert "and 2 x *E for MTP on rank 1" in texts


def test_stages_are_parted_in_the_strip():
    plan = planned('model.pattern="MEM|*-|E|M"', "parallel.pipeline=2")
    assert len(list(drawn(plan).iter(f"{SVG}line"))) == 4 + 1


def test_a_name_is_text_and_no_markup():
    plan = replace(planned("parallel.pipeline=2"), name='<b>"me" & you</b>')
    title = drawn(plan).find(f"{SVG}title")
    assert title is not None
    assert (title.text or "").startswith('<b>"me" & you</b>, 1f1b')


def test_the_same_plan_is_the_same_picture():
    assert svg(planned("parallel.pipeline=2")) == svg(planned("parallel.pipeline=2"))
    assert svg(planned("parallel.pipeline=2")) != svg(planned("parallel.pipeline=2", microbatches=5))


def test_numbers_stand_where_there_is_room():
    few, many = drawn(planned("parallel.pipeline=2", microbatches=2)), planned("parallel.pipeline=2", microbatches=512)
    assert sum(text.get("class") == "number" for text in few.iter(f"{SVG}text")) == 8
    assert not [text for text in drawn(many).iter(f"{SVG}text") if text.get("class") == "number"]


def test_the_picture_of_the_page_is_what_its_command_draws():
    picture = Path(__file__).parents[2] / "docs" / "images" / "pipeline.svg"
    plan = plan_pipeline(load_model_config(["experiment=nemotron3_nano_30b", "parallel.pipeline=4"]), 16)
    command = (
        "nemohybrid plan pipeline experiment=nemotron3_nano_30b parallel.pipeline=4 --out docs/images/pipeline.svg"
    )
    assert picture.read_text(encoding="utf-8") == svg(plan), f"draw it again: {command}"
