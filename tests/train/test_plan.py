"""What a plan counts, by hand and against the program that XLA makes; from a config.json alone."""

import json

import pytest

from dflash_jax.core import InputError, parse_device, parse_mesh
from dflash_jax.targets import read_target_config
from dflash_jax.train import TrainConfig, train
from dflash_jax.train.init import drafter_config
from dflash_jax.train.plan import Shapes, flops_per_device, link_traffic, memory_bytes, step_flops
from support.gpt_oss import GPT_OSS_20B


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets") / "gpt-oss-20b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GPT_OSS_20B))
    return folder


def plan(target, out, **changes):
    settings = {"features": "live", "num_layers": 8, "length": 1024, "dtype": "bfloat16", "plan": True}
    return train(TrainConfig(target=target, out=out / "run", **settings | changes))


def test_gpt_oss_20b_from_its_config_alone(gpt_oss, tmp_path):
    told = plan(gpt_oss, tmp_path, device="h100")
    assert not (tmp_path / "run").exists()
    # by hand: 8 layers of q, o 2880 x 4096, k, v 2880 x 512, three of 2880 x 7680, and fc of 4 x 2880 x 2880
    layer = 2 * 2880 * 4096 + 2 * 2880 * 512 + 3 * 2880 * 7680
    matrices = 8 * layer + 4 * 2880 * 2880
    small = 8 * (2 * 2880 + 2 * 64 + 4096 + 2 * 512 + 2880) + 2 * 2880
    assert told["drafter"]["num_parameters"] == matrices + small
    slots, tokens, drafted = 4 * 64 * 8, 4 * 1024, 4 * 64 * 7
    assert told["flops"]["layers"] == 6 * slots * 8 * layer
    assert told["flops"]["head"] == 4 * drafted * 2880 * 201088
    sampled = plan(gpt_oss, tmp_path, device="h100", sampled_vocab=8192)
    assert sampled["flops"]["head"] == 4 * drafted * 2880 * 8192
    assert sampled["memory_traffic"]["logits"] == pytest.approx(told["memory_traffic"]["logits"] * 8192 / 201088)
    assert told["flops"]["context"] == 4 * tokens * 4 * 2880 * 2880 + 12 * tokens * 2880 * 512 * 8
    assert told["flops"]["attention"] == 14 * slots * (1024 + 8) * 4096 * 8
    assert told["flops"]["total"] == told["flops"]["per_device"]
    assert told["memory"]["weights"] == 4 * (matrices + small)
    assert told["link_traffic"]["total"] == 0
    # 20.9 B weights in bfloat16, the drafter's float32 and moments, and a step fit 80 GB
    assert 41e9 < told["memory"]["target"] < 42e9
    assert told["fits"] is True
    assert told["time"]["step_s"] == pytest.approx(
        max(told["time"]["compute_s"], told["time"]["memory_s"]) + told["time"]["links_s"], rel=1e-3
    )


def test_a_slice_shares_the_work(gpt_oss, tmp_path):
    one = plan(gpt_oss, tmp_path, device="h100", sequences_per_step=8)
    told = plan(gpt_oss, tmp_path, device="v6e-8", mesh="data=2,model=4", sequences_per_step=8)
    assert told["num_devices"] == 8
    assert told["flops"]["total"] == one["flops"]["total"]
    # the context is made by every device of a group, the rest is shared out
    own = told["flops"]
    rest = own["total"] - own["context"]
    assert own["per_device"] == pytest.approx(own["context"] / 2 + rest / 8)
    weights = one["memory"]["weights"]
    assert told["link_traffic"]["gradient"] == weights * 7 / 8
    assert told["memory"]["moments"] == one["memory"]["moments"] // 8


def test_parts_need_less_memory_and_more_traffic(gpt_oss, tmp_path):
    mesh = {"device": "v6e-8", "mesh": "data=4,model=2", "sequences_per_step": 16, "anchors_per_sequence": 512}
    whole, parts = plan(gpt_oss, tmp_path, **mesh), plan(gpt_oss, tmp_path, **mesh, accumulate=4)
    assert parts["flops"] == whole["flops"]
    for name in ("activations", "attention_scratch"):
        assert parts["memory"][name] == whole["memory"][name] // 4
    assert parts["memory"]["added"] == whole["memory"]["weights"] // 8
    assert parts["memory"]["step"] < whole["memory"]["step"]
    assert parts["link_traffic"]["gradient"] == 4 * whole["link_traffic"]["gradient"]
    assert parts["memory_traffic"]["activations"] == whole["memory_traffic"]["activations"]
    with pytest.raises(InputError, match=r"--mesh data=4,model=2 splits it into 4 in 8 parts"):
        plan(gpt_oss, tmp_path, **mesh, accumulate=8)


def test_devices_are_named_as_clouds_name_them():
    assert [parse_device(name)[1] for name in ("h100", "v6e", "v6e-8", "v5p", "v5p-64")] == [1, 1, 8, 1, 32]
    for name in ("tpu", "v6e-0", "v6e-", "8", ""):
        with pytest.raises(InputError, match=r"^--device is "):
            parse_device(name)
    with pytest.raises(InputError, match=r"--device is 'v5p-3': a v5p chip counts as 2, give a multiple of it"):
        parse_device("v5p-3")


def test_a_mesh_of_another_size_is_refused(gpt_oss, tmp_path):
    with pytest.raises(InputError, match=r"--device v5p-64 is 32 chips, --mesh data=8 is 8: make them equal"):
        plan(gpt_oss, tmp_path, device="v5p-64", mesh="data=8", sequences_per_step=8)
    with pytest.raises(InputError, match=r"--sequences-per-step is 4, --mesh data=8 splits it into 8"):
        plan(gpt_oss, tmp_path, device="v6e-8", mesh="data=8")


def test_layers_that_the_drafter_has_not_are_refused_before_it_starts(gpt_oss, tmp_path):
    with pytest.raises(InputError, match=r"--full-layers is 9: the drafter has layers 0 to 7"):
        plan(gpt_oss, tmp_path, device="h100", num_layers=8, sliding_window=64, full_layers=(9,))


def test_flags_of_a_plan_belong_to_it(tmp_path):
    with pytest.raises(InputError, match=r"--device and --length only tell --plan what to count: give them with it"):
        TrainConfig(target=tmp_path, out=tmp_path, cache=tmp_path, device="h100")
    with pytest.raises(InputError, match=r"--utilisation is 0.0: more than 0 and at most 1 is needed"):
        TrainConfig(target=tmp_path, out=tmp_path, cache=tmp_path, plan=True, utilisation=0.0)
    with pytest.raises(InputError, match=r"--features cached needs --cache, and no --responses"):
        TrainConfig(target=tmp_path, out=tmp_path, plan=True)


@pytest.mark.slow
def test_this_machine_is_tried_and_the_cache_is_read(target_folder, cache, tmp_path):
    told = train(TrainConfig(target=target_folder, cache=cache, out=tmp_path / "run", num_layers=1, plan=True))
    # 40 + 24 tokens are the longest
    assert told["batch"]["tokens_per_sequence"] == 64
    assert told["drafter"]["capture_layers"] == [1, 3]
    assert told["time"]["run_s"] == pytest.approx(2000 * told["time"]["step_s"], rel=1e-3)
    assert told["how"].endswith("timed here")
    assert not (tmp_path / "run").exists()


def test_a_16_bit_run_on_a_cpu_reads_float32_and_narrows_the_head(gpt_oss, tmp_path):
    target = read_target_config(gpt_oss)
    drafter = drafter_config(target, capture_layers=(1, 5), num_layers=2, block_size=8, mask_token_id=0)

    def start(**settings):
        config = TrainConfig(target=gpt_oss, cache=tmp_path, out=tmp_path, plan=True, **settings)
        mesh = parse_mesh("data=1")
        shapes = Shapes(config=config, target=target, drafter=drafter, width=64, features_itemsize=2, mesh=mesh)
        return memory_bytes(shapes)["start"]

    wide = start(dtype="float32")
    assert start(dtype="bfloat16", sampled_vocab=4096) == wide
    assert start(dtype="bfloat16") == wide + 2 * 201088 * 2880


def test_the_device_with_most_to_do(gpt_oss, tmp_path):
    target = read_target_config(gpt_oss)
    drafter = drafter_config(target, capture_layers=(1, 5), num_layers=2, block_size=8, mask_token_id=0)
    config = TrainConfig(
        target=gpt_oss, out=tmp_path, features="live", plan=True, length=64, sequences_per_step=6,
        anchors_per_sequence=6,
    )  # fmt: skip

    def shapes(mesh):
        return Shapes(
            config=config, target=target, drafter=drafter, width=64, features_itemsize=4, mesh=parse_mesh(mesh)
        )

    flops = step_flops(shapes("data=1"))
    # six blocks do not divide by four devices, the vocabulary of 201088 does
    assert shapes("model=4").block_parts == 1
    assert shapes("model=4").head_parts == 4
    mine = flops_per_device(shapes("model=4"), flops)
    assert mine == pytest.approx(
        flops["context"] + flops["layers"] + flops["attention"] + (flops["head"] + flops["target"]) / 4
    )
    assert link_traffic(shapes("data=3"))["head"] == 0
