"""The documents' tables are those of results.json, and a part's line of JSON makes its table."""

import json
import subprocess

import jax
import pytest

from tests import runs
from tests.bench import parts, tables

RESULTS = json.loads((runs.ROOT / parts.RESULTS).read_text())
TEXTS = {name: (runs.ROOT / name).read_text() for name in parts.DOCUMENTS}


@pytest.mark.parametrize("name", TEXTS)
def test_documents_are_up_to_date(name):
    text = tables.rewrite(TEXTS[name], tables.blocks(RESULTS))
    assert text == TEXTS[name], f"{name} differs from results.json: edit neither by hand"


def test_each_block_stands_in_one_document():
    names = [found[2] for text in TEXTS.values() for found in tables.MARKED.finditer(text)]
    assert sorted(names) == sorted(tables.blocks(RESULTS))


def test_text_outside_of_markers_is_kept():
    text = (
        "before\n<!-- begin a -->\nold\n<!-- end a -->\nbetween\n<!-- begin b -->\n<!-- end b -->"
    )
    assert tables.rewrite(text, {"a": "new", "b": "newer"}) == (
        "before\n<!-- begin a -->\n\nnew\n\n<!-- end a -->\nbetween\n"
        "<!-- begin b -->\n\nnewer\n\n<!-- end b -->"
    )
    with pytest.raises(KeyError, match="b"):
        tables.rewrite(text, {"a": "new"})


def test_a_part_is_measured_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "find_commit", lambda: "abc1234")
    figures = {"bits": {"as it must be": 3}}
    (tmp_path / "abc1234.json").write_text(json.dumps(figures))
    # A bench that prints these figures.
    part = parts.Part("", "", ("json.tool", "--compact", f"{tmp_path}/{{commit}}.json"))
    entry = parts.measure(part)
    assert entry["figures"] == figures
    assert entry["command"] == f"python -m json.tool --compact {tmp_path}/abc1234.json"
    assert entry["versions"]["jax"] == jax.__version__
    entry |= {"date": "2026-12-01", "processor": "CPU, 2 cores", "seconds": 5}
    entry["versions"] = {"python": "3.11.1", "jax": "0.9.0"}
    assert tables.blocks(RESULTS | {"faults": entry})["faults"] == (
        "`make bench ONLY=faults`, 2026-12-01, commit abc1234, CPU, 2 cores, python 3.11.1, "
        "jax 0.9.0, 5 s in all.\n\n"
        "| fault | injected | what happened |\n"
        "| --- | --- | --- |\n"
        "| bits | 3 | as it must be: 3 |"
    )


def test_a_failed_part_gives_no_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "find_commit", lambda: "abc1234")
    with pytest.raises(subprocess.CalledProcessError):
        parts.measure(parts.Part("", "", ("json.tool", str(tmp_path / "none.json"))))


def test_the_commit_tells_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(parts.runs, "ROOT", tmp_path)

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-qm", "a")
    commit = parts.find_commit()
    assert len(commit) >= 7
    (tmp_path / parts.RESULTS).parent.mkdir(parents=True)
    (tmp_path / parts.RESULTS).write_text("{}")
    assert parts.find_commit() == commit
    (tmp_path / "code.py").write_text("a = 2\n")
    assert parts.find_commit() == f"{commit}+changes"


def rows(text: str) -> list[list[str]]:
    """Cells of a table, without the line of dashes."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [lines[0], *lines[2:]]


def test_step():
    figures = {
        "resnet18_late_4x256": 0.951,
        "encoder_8x128": 1.094,
        "seconds": {
            "resnet18_late_4x256": {"ours": 1.2, "pytorch": 1.2618},
            "encoder_8x128": {"ours": 0.0547, "pytorch": 0.05},
        },
        "rounds": 7,
    }
    assert rows(tables.step(figures))[1:] == [
        ["whole step, ResNet-18, late fusion, 4 x 256 pixels", "1.200 s", "1.262 s", "0.95"],
        ["encoder, ResNet-50, S2, 8 x 128 pixels", "0.055 s", "0.050 s", "1.09"],
    ]


def test_input():
    figures = {
        "samples_per_second": 965.4,
        "memory_bytes": 120_000_000,
        "samples_per_second_ratio": 32.112,
        "memory_bytes_ratio": 0.5,
        "lmdb": {"samples_per_second": 30.06, "memory_bytes": 240_000_000},
        "threads": 2,
    }
    assert rows(tables.input_(figures))[1:] == [
        ["samples per second", "965.4", "30.06", "32.1"],
        ["memory, MB", "120", "240", "0.5"],
    ]


def test_end_to_end():
    figures = {
        "resnet18_images_per_second": 3.96,
        "resnet18_wait_for_data": 0.00012,
        "first_start_seconds": 54.3,
        "second_start_seconds": 16.2,
        "batch_size": 8,
    }
    assert rows(tables.end_to_end(figures))[1:] == [
        ["ResNet-18, images per second", "3.96"],
        ["ResNet-18, share of time that waits for data", "0.012 %"],
        ["first start of the sample, to its first step", "54 s"],
        ["second start, from compiled programs", "16 s"],
    ]


def test_tpu():
    megabytes = {"encoder": 400, "decoder": 200, "optimizer": 40, "others": 4.4}
    fits = {
        "hbm_gigabytes": 0.6444,
        "teraflop": 0.2224,
        "temporaries_gib": 2.126,
        "parts_gigabytes": {part: size / 1e3 for part, size in megabytes.items()},
        "beside_the_networks": 0.047,
    }
    found = rows(tables.tpu({"16": fits, "256": {"images": 256, "needed_gib": 20.5}}))
    traffic = ["0", "0", "400", "200", "0", "0", "44"]
    assert found[1] == ["16", "0.644", *traffic, "4.7%", "0.222", "2.13 GiB"]
    assert found[2] == ["256", "does not fit: 20.50 GiB", *[""] * 10]
    assert {len(row) for row in found} == {12}


def test_processes():
    figures = {
        "samples": {"seen": 160, "different": 32},
        "ended": {"loss_difference": 1.23e-7, "same_samples_and_views": False},
        "SIGKILL to process 1": {"seconds_until_the_other_ended": 6.1, "its_status": 1},
    }
    compared, ends = tables.processes(figures).split("\n\n")
    assert rows(compared)[1:] == [[tables.COMPARED_RUNS["ended"], "1.2e-7", "DIFFERENT"]]
    assert rows(ends)[1:] == [["SIGKILL to process 1", "6.1 s", "1"]]


def test_faults():
    figures = {"bits": {"as it must be": 3}, "disks": {"as it must be": 1, "NOT NOTICED": 1}}
    assert tables.faults(figures).splitlines()[2:] == [
        "| bits | 3 | as it must be: 3 |",
        "| disks | 2 | as it must be: 1, NOT NOTICED: 1 |",
    ]


def test_mutants_and_fuzz():
    figures = {"failed": 90, "took too long": 1, "LIVED": 4, "equal": 5, "killed_share": 0.958}
    assert rows(tables.mutants(figures))[1:] == [["91", "4", "5", "96 %"]]
    figures = {"legend_csv": {"read": 2, "refused": 3, "failed": 0, "faults": 1}}
    assert rows(tables.fuzz(figures))[1:] == [["legend csv", "2", "3", "1"]]


def test_parity():
    figures = {"errors": {"train_logits": 3.14e-6}, "tolerances": {"train_logits": 1e-4}}
    assert rows(tables.parity(figures))[1:] == [["train logits", "3.1e-06", "1e-04"]]


def test_claims():
    one, two = {"mean": 30.81, "seeds": [30.81]}, {"mean": 42.25, "std": 3.36, "seeds": [40, 44.5]}
    figures = {
        "miou": {"random/s1/frozen/pspnet": one, "CromSS/s2/trained/unet": two},
        "differences": {"CromSS minus random/s2/trained/unet": two},
        "wrong_labels_selected": {"CromSS/s2": {"first": 35.1, "lowest": 20.4, "last": 26.0}},
    }
    scores, differences, selected = tables.claims(figures).split("\n\n")
    assert rows(scores) == [
        ["mIoU", "S1 frozen, PSPNet", "S2 fine-tuned, U-Net"],
        ["random", "30.8", ""],
        ["CromSS", "", "42.2 ± 3.4"],
    ]
    assert rows(differences)[1:] == [["CromSS minus random", "42.2 ± 3.4 (40.0, 44.5)"]]
    assert rows(selected)[1:] == [["CromSS, S2", "35 %", "20 %", "26 %"]]


def test_audit():
    def ranked(auroc):
        return {"auroc": auroc, "auprc": 0.8, **{f"precision_at_{n}": 0.9 for n in (1, 5, 10)}}

    def seed(shift):
        iou = {"s1": 40 + shift, "both": 50.0}
        return {
            "ranking": {"audit": ranked(0.9 + shift / 100)},
            "rates": {
                "estimate": 0.3,
                "truth": 0.34,
                "calibration_error": 0.04,
                "classes": {"water": [0.1, 0.125], "trees": [None, None]},
            },
            "kinds": {"confused": dict.fromkeys(
                ("share", "auroc", "mean_probability", "found_at_0.5", "suggested_right"), 0.5
            )},
            "selection": {"audit, with": ranked(0.91)},
            "cleaned": {
                "labels": dict.fromkeys(
                    ("changed", "changed_was_wrong", "changed_is_right", "wrong_before",
                     "wrong_after"), 0.25
                ),
                "folds": [{f"{when}, {group}": iou for when in ("before", "after")
                           for group in ("held back", "other fold")}],
            },
        }  # fmt: skip

    shown = tables.audit({"seeds": {"0": seed(0), "1": seed(1)}})
    found = [rows(part) for part in shown.split("\n\n")[1:]]
    assert found[0][1][:3] == ["audit", "0.900, 0.910", "0.800, 0.800"]
    assert found[1][1:] == [
        ["all labels", "30.0, 30.0", "34.0, 34.0"],
        ["water", "10.0, 10.0", "12.5, 12.5"],
        ["trees", "–, –", "–, –"],
        ["calibration error", "4.0, 4.0", ""],
    ]
    assert found[2][1] == ["confused", *["0.50, 0.50"] * 5]
    assert found[3][1][0] == "audit, with"
    assert ["mIoU of s1, held back", "40.0 to 40.0, 41.0 to 41.0"] in found[4]


def test_maps():
    figures = {f"{n}_pixels_per_{k}": 1234.5 for n in ("predict", "loop") for k in
               ("processors", "seconds")} | {"same_classes": 0.9997}  # fmt: skip
    shown = tables.maps(figures)
    assert rows(shown.partition("\n\n")[0])[1] == ["`predict`", "1,234", "1,234"]
    assert shown.endswith("99.97 % of the pixels.")
