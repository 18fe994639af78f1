"""Studies out of studies: several sweeps as one, or some of the runs of one.

Ours; what is compared is what settings differ in, seeds apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deepseek_jax.analysis.runs import Study
from deepseek_jax.config import flatten

COMMON = "; "  # between the titles of several sweeps


def together(studies: Sequence[Study], path: Path) -> Study:
    """Several studies as one, whose report goes to `path`.

    Where two have a run of one name, or a label, all names and labels begin with the
    folder's.

    Raises:
      ValueError: two folders have one name as well.
    """
    if len(studies) == 1:
        return replace(studies[0], path=path)
    folders = [study.path.resolve().name for study in studies]
    if len({*folders}) < len(folders):
        raise ValueError(
            f"folders {', '.join(folders)}: must have different names to be told apart"
        )
    names = [name for s in studies for name in {r.name for r in s.runs}]
    labels = [label for s in studies for label in s.labels]
    alike = len({*names}) < len(names) or len({*labels}) < len(labels)
    runs = [
        replace(run, name=f"{folder}/{run.name}", label=f"{folder} {run.label}")
        if alike
        else run
        for folder, study in zip(folders, studies, strict=True)
        for run in study.runs
    ]
    return Study(
        path,
        COMMON.join(study.title for study in studies),
        runs,
        "\n\n".join(study.about for study in studies if study.about),
        watched=tuple(dict.fromkeys(m for study in studies for m in study.watched)),
    )


def only(study: Study, wanted: Mapping[str, str]) -> Study:
    """The runs whose settings are as wanted: their values, as text, by dotted key.

    Raises:
      ValueError: no run has such a setting, or none has that value.
    """
    runs = study.runs
    for key, text in wanted.items():
        values = dict.fromkeys(str(run.get(key)) for run in runs)
        if {*values} == {"None"}:
            raise ValueError(f"--only {key}={text}: no run has a setting {key}")
        runs = [run for run in runs if str(run.get(key)) == text]
        if not runs:
            raise ValueError(f"--only {key}={text}: there is {', '.join(values)}")
    return replace(study, runs=runs)


def differing(study: Study) -> dict[str, dict[str, str]]:
    """What the settings of a study differ in: values by key, then by label.

    Of each label the first run counts; seeds and "" for what is not set are left out.
    """
    flat = {label: flatten(study.of(label)[0].config) for label in study.labels}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = {
        key: {label: str(settings.get(key, "")) for label, settings in flat.items()}
        for key in keys
        if key != "seed"
    }
    return {key: row for key, row in rows.items() if len({*row.values()}) > 1}
