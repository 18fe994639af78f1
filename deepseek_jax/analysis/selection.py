"""Studies out of studies: several sweeps as one, or some of the runs of one.

Ours; what is compared is what settings differ in, seeds apart.
"""

import difflib
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


def only(study: Study, wanted: Mapping[str, Sequence[str]]) -> Study:
    """The runs whose settings are as wanted, by dotted key: any of the values, as text.

    Raises:
      ValueError: no run has such a setting, or none has one of the values.
    """
    runs = study.runs
    for key, texts in wanted.items():
        values = dict.fromkeys(str(run.get(key)) for run in runs)
        if {*values} == {"None"}:
            hint = _near(study, key)
            raise ValueError(
                f"--only {key}={texts[0]}: no run has a setting {key}{hint}"
            )
        for text in texts:
            if text not in values:
                raise ValueError(f"--only {key}={text}: there is {', '.join(values)}")
        runs = [run for run in runs if str(run.get(key)) in texts]
    return replace(study, runs=runs)


def _near(study: Study, key: str) -> str:
    """A hint at the setting that was meant, or at those that there are."""
    known = dict.fromkeys(
        name
        for run in study.runs
        for name in (*run.overrides, *flatten(run.config))
        if name != "name"
    )
    ends = [name for name in known if name.endswith(f".{key}")]
    near = ends or difflib.get_close_matches(key, known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    varied = [*differing(study), "seed"]
    return f"; what differs is {', '.join(varied)}"


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
