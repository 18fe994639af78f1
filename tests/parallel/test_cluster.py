"""What the environment says of other processes; nothing is started."""

import pytest

from deepseek_jax.parallel.cluster import (
    ADDRESS,
    COUNT,
    INDEX,
    Place,
    initialize,
    place,
)

OWN = {ADDRESS: "node1:1234", COUNT: "4", INDEX: "3"}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (OWN, Place("node1:1234", 4, 3)),
        (STEP | OWN, Place("node1:1234", 4, 3)),
        (OWN | {COUNT: "1", INDEX: "0"}, None),
        ({ADDRESS: "node1:1234"}, None),  # with nothing that says how many
        (STEP, Place()),
        (STEP | {"SLURM_NTASKS": "1"}, None),
        # A batch script or salloc's shell is no step of srun's.
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, None),
        (STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Place()),
        (STEP | {"CUDA_VISIBLE_DEVICES": "2"}, Place(devices=(0,))),
        (
            STEP | {"SLURM_NTASKS": "2", "CUDA_VISIBLE_DEVICES": "0,1,2"},
            Place(devices=(0, 1, 2)),
        ),
    ],
)
def test_place(environment, expected):
    assert place(environment) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({ADDRESS: ""}, f"{ADDRESS} is not set"),
        ({COUNT: ""}, f"{COUNT} is not set"),
        ({INDEX: "4"}, f"{INDEX} = '4': must be a number from 0 to 3"),
        ({COUNT: "0"}, f"{COUNT} = '0': must be a number from 1 to"),
        ({COUNT: "two"}, f"{COUNT} = 'two': must be a number"),
        ({COUNT: "1"}, f"{INDEX} = '3': must be a number from 0 to 0"),
        ({ADDRESS: "node1"}, f"{ADDRESS} = 'node1': must be host:port"),
    ],
)
def test_half_an_environment_is_refused(change, message):
    with pytest.raises(ValueError) as error:
        place(OWN | change)
    assert message in str(error.value)


def test_what_is_left_out_is_named():
    for name in OWN:
        rest = {k: v for k, v in OWN.items() if k != name}
        with pytest.raises(ValueError, match=f"{name} is not set"):
            place(rest)


@pytest.mark.parametrize(("platforms", "refused"), [("cuda,cpu", True), ("cpu", False)])
def test_a_gpu_that_is_asked_for_and_not_there(platforms, refused):
    """JAX alone would train on the CPU and say nothing."""
    environment = {"JAX_PLATFORMS": platforms}
    if not refused:
        return initialize(environment)
    with pytest.raises(ValueError, match=r"finds no GPU here; install jax\[cuda13\]"):
        initialize(environment)
