"""A whole pipeline quantized: decoders, encoders and denoisers, each with its own executor."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tfmq
from tfmq.artifact import verify_files
from tfmq.backends.execution import backend_names
from tfmq.integrations.diffusers.opening import open_pipeline
from tfmq.integrations.diffusers.pipelines import PipelineSampler
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.nn.plan import packed_layers
from tfmq.nn.submodules import submodules
from tfmq.nn.swap import is_quantized, networks_of
from tfmq.numerics.errors import sqnr_db
from tfmq.quantizers.part import Held
from tfmq.recipes import Calibration, Recipe, Rule
from tfmq.recipes.networks import image_w8a8
from tfmq.storage.directory import components
from tfmq.storage.errors import ChecksumError
from tfmq.storage.prompts import PROMPTS_FILE, prompts_content
from tfmq.targets import open_sampler

pytestmark = pytest.mark.filterwarnings("default")
STEPS = 2
# All are compared with `simulated`, and `float` does not round what layers read.
COMPARED = [name for name in backend_names() if name not in ("auto", "simulated", "float")]


def opened(path: Path, **options: Any) -> PipelineSampler:
    """Return a sampler of the pipeline at a path."""
    with quiet():
        return PipelineSampler(open_pipeline(path), prompts=("a", "b c"), options=options)


def brief(recipe: Recipe) -> Recipe:
    """Return a recipe that is calibrated on two images of two steps."""
    return replace(recipe, calibration=Calibration(samples=2, steps=STEPS, interval=1, batch_size=2))


def digests(directory: Path) -> dict[str, str]:
    """Return the digest of every file below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256(path.read_bytes()).hexdigest() for path in files}


def latents(sampler: PipelineSampler, steps: int = 4) -> Tensor:
    """Return what a pipeline decodes at the end of its trajectory, three images of noise of their own."""
    with sampler.noted_latents() as noted:
        sampler.run(range(3), steps=steps, seed=5)
    return torch.cat(noted)


@pytest.mark.parametrize("backend", COMPARED, indirect=True)
def test_every_part_of_a_pipeline_is_loaded_and_computed_by_a_backend(
    family: Callable[[str], Any], backend: str
) -> None:
    made = family("sd1")
    simulated, executed = (tfmq.load(made.quantized, backend=name) for name in ("simulated", backend))
    parts = {
        name: networks_of(part) for name, part in executed.components.items() if isinstance(part, nn.Module)
    }
    assert {name: [*found] for name, found in parts.items()}["vae"] == ["decoder"]
    given = latents(made.reference)
    with torch.no_grad():
        expected, found = (each.vae.decode(given).sample for each in (simulated, executed))
        full = made.reference.pipeline.vae.decode(given).sample
    assert sqnr_db(expected, found) > 35
    assert sqnr_db(full, found) > 25
    drawn = [
        PipelineSampler(each, prompts=("a",)).run(range(2), steps=4, seed=0) for each in (simulated, executed)
    ]
    assert sqnr_db(*drawn) > 25


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Return the text encoders of a pipeline by name."""
    return {
        name: part
        for name, part in pipeline.components.items()
        if name.startswith("text_encoder") and part is not None
    }


@pytest.mark.parametrize("backend", COMPARED, indirect=True)
@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_text_encoders_are_loaded_and_computed_by_a_backend(
    family: Callable[[str], Any], name: str, backend: str
) -> None:
    made = family(name)
    simulated, executed = (tfmq.load(made.quantized, backend=each) for each in ("simulated", backend))
    ids = torch.randint(4, 20, (2, 7))
    stock, found = text_encoders(made.reference.pipeline), text_encoders(executed)
    assert found and stock.keys() == found.keys()
    for encoder, module in found.items():
        assert is_quantized(module) and packed_layers(module)
        with torch.no_grad():
            expected = text_encoders(simulated)[encoder](ids, output_hidden_states=True)
            output = module(ids, output_hidden_states=True)
            full = stock[encoder](ids, output_hidden_states=True)
        assert type(output) is type(full) and output.keys() == full.keys()
        assert sqnr_db(expected[0], output[0]) > 30 and sqnr_db(full[0], output[0]) > 15
        assert sqnr_db(expected.hidden_states[-2], output.hidden_states[-2]) > 30


def test_codes_keep_their_type_where_transformers_holds_a_layer_in_float32(
    family: Callable[[str], Any],
) -> None:
    """As it does with `wo` of T5 in half precision."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        str(family("pixart").quantized), torch_dtype=torch.float16
    )
    layers = packed_layers(pipeline.text_encoder)
    assert any(name.endswith(".wo") for name in layers)
    assert all(layer.packed.dtype == torch.uint8 for layer in layers.values())


@pytest.mark.parametrize("name", ["sd1", "pixart"])
def test_a_loaded_pipeline_is_saved_again_to_the_same_seals(
    family: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    tfmq.load(family(name).quantized, backend="simulated").save_pretrained(tmp_path / "again")
    before, after = components(family(name).quantized), components(tmp_path / "again")
    assert len(before) == 3
    assert {path.name: found.seal for path, found in before.items()} == {
        path.name: found.seal for path, found in after.items()
    }
    verify_files(tmp_path / "again")


def test_a_changed_text_encoder_is_refused(family: Callable[[str], Any], tmp_path: Path) -> None:
    copytree(family("sd1").quantized, tmp_path / "changed")
    weights = tmp_path / "changed" / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["final_layer_norm.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ChecksumError):
        tfmq.load(tmp_path / "changed")


def test_a_decoder_keeps_no_weight_twice_and_goes_on_tiling_and_slicing(family: Callable[[str], Any]) -> None:
    pipeline = tfmq.load(family("sd1").quantized, backend="torch")
    layers = packed_layers(pipeline.vae.decoder)
    assert len(layers) > 10
    assert not submodules(pipeline.vae.decoder, Held)
    given = latents(family("sd1").reference)
    with torch.no_grad():
        whole = pipeline.vae.decode(given).sample
        pipeline.vae.enable_slicing()
        assert sqnr_db(whole, pipeline.vae.decode(given).sample) > 60
        pipeline.vae.enable_tiling()
        pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 6, 12
        tiled = pipeline.vae.decode(given).sample
        full = family("sd1").reference.pipeline.vae
        full.enable_tiling()
        full.tile_latent_min_size, full.tile_sample_min_size = 6, 12
        try:
            expected = full.decode(given).sample
        finally:
            full.disable_tiling()
    assert sqnr_db(expected, tiled) > 25


def test_the_report_has_a_section_for_each_component(family: Callable[[str], Any]) -> None:
    report = json.loads((family("sd1").quantized / "tfmq_report.json").read_text())
    decoder = report["components"]["vae"]["networks"]["vae.decoder"]
    assert decoder["layers"] > 10 and decoder["tolerance"]["output_db"] > 30
    sizes = report["components"]["vae"]["bytes"]
    assert sizes["quantized"] < sizes["fp32"]
    words = report["components"]["text_encoder"]["networks"]["text_encoder"]
    assert words["layers"] > 10 and words["tolerance"]["instead"] == "weights"
    encoder = report["components"]["vae"]["networks"]["vae.encoder"]
    assert encoder == {"left": "the pipeline made no call of it that can be recorded"}
    listed = json.loads((family("sd1").quantized / "tfmq_files.json").read_text())
    assert {"unet", "vae", "text_encoder"} == listed["components"].keys()


def test_a_component_of_another_pipeline_is_refused(family: Callable[[str], Any], tmp_path: Path) -> None:
    copytree(family("sd1").quantized, tmp_path / "mixed")
    verify_files(tmp_path / "mixed")
    rmtree(tmp_path / "mixed" / "vae")
    copytree(family("turbo").quantized / "vae", tmp_path / "mixed" / "vae")
    with pytest.raises(ChecksumError, match="vae is of another pipeline"):
        tfmq.load(tmp_path / "mixed")


def test_an_interrupted_job_ends_in_the_same_bytes(
    family: Callable[[str], Any],
    recipe_of: Callable[[str], Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tfmq.jobs.networks as networks

    stock, recipe = family("sd1").stock, brief(recipe_of("sd1"))
    tfmq.quantize(opened(stock), recipe, output_dir=tmp_path / "whole", components="denoiser,vae")

    class Killed(BaseException):
        """Ends the process, as far as anybody can tell."""

    def die(*_: Any) -> None:
        raise Killed

    recorded = tmp_path / "cut.job" / "calibration" / "of_vae.decoder"
    with monkeypatch.context() as patch:
        patch.setattr(networks, "layer_errors", die)
        with pytest.raises(Killed):
            tfmq.quantize(opened(stock), recipe, output_dir=tmp_path / "cut", components="denoiser,vae")
    assert sorted(path.name for path in recorded.iterdir()) == ["call_00000.safetensors", "of_held_out"]
    kept = digests(recorded)
    tfmq.quantize(opened(stock), recipe, output_dir=tmp_path / "cut", components="denoiser,vae", resume=True)
    assert len(kept) == 2 and digests(tmp_path / "cut") == digests(tmp_path / "whole")
    again = tfmq.quantize(
        opened(stock), recipe, output_dir=tmp_path / "cut", components="denoiser,vae", resume=True
    )
    assert again.report["components"]["vae"]["bytes"]["quantized"] > 0


def test_the_denoiser_is_the_same_whatever_is_quantized_beside_it(
    family: Callable[[str], Any], recipe_of: Callable[[str], Recipe]
) -> None:
    found = [
        tfmq.quantize(opened(family("sd1").stock), brief(recipe_of("sd1")), components=components)
        for components in ("denoiser", ("denoiser", "vae"))
    ]
    assert found[0].manifest["digest"] == found[1].manifest["digest"]
    assert "components" not in found[0].report
    assert not networks_of(found[0].model.vae) and [*networks_of(found[1].model.vae)] == ["decoder"]


def test_image_to_image_quantizes_both_halves_of_the_autoencoder(
    family: Callable[[str], Any], recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    parts = opened(family("sd1").stock).pipeline.components
    parts["image_encoder"] = None
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    picture = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    given = {"image": picture.expand(2, -1, -1, -1), "strength": 1.0}
    sampler = PipelineSampler(pipeline, prompts=("a",), options=given)
    exact = sampler.run(range(2), steps=STEPS, seed=0)
    with torch.no_grad():
        encoded = pipeline.vae.encode(2 * picture - 1).latent_dist.mean
    done = tfmq.quantize(sampler, brief(recipe_of("sd1")), output_dir=tmp_path / "both")
    assert {*done.report["components"]["vae"]["networks"]} == {"vae.decoder", "vae.encoder"}
    loaded = tfmq.load(tmp_path / "both", backend="torch")
    assert [*networks_of(loaded.vae)] == ["encoder", "decoder"]
    with torch.no_grad():
        assert sqnr_db(encoded, loaded.vae.encode(2 * picture - 1).latent_dist.mean) > 25
    drawn = PipelineSampler(loaded, prompts=("a",), options=given).run(range(2), steps=STEPS, seed=0)
    assert sqnr_db(exact, drawn) > 15


def test_a_pipeline_of_pixels_has_a_denoiser_alone(
    family: Callable[[str], Any], recipe_of: Callable[[str], Recipe]
) -> None:
    done = tfmq.quantize(opened(family("ddpm").stock), brief(recipe_of("ddpm")), components="all")
    assert "components" not in done.report and is_quantized(done.model.unet)


def test_a_component_that_cannot_be_quantized_is_named_and_left(
    family: Callable[[str], Any], recipe_of: Callable[[str], Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tfmq.jobs.networks as networks

    def unusual(*_: Any) -> Mapping[str, float]:
        raise ValueError("nobody\nhas seen such a decoder")

    sampler = opened(family("sd1").stock)
    given = latents(sampler)
    weights = {name: tensor.clone() for name, tensor in sampler.pipeline.vae.state_dict().items()}
    with torch.no_grad():
        exact = sampler.pipeline.vae.decode(given).sample
    monkeypatch.setattr(networks, "layer_errors", unusual)
    done = tfmq.quantize(sampler, brief(recipe_of("sd1")), components=["denoiser", "vae"])
    section = done.report["components"]["vae"]
    assert section["networks"]["vae.decoder"] == {"left": "nobody has seen such a decoder"}
    assert "bytes" not in section and not networks_of(done.model.vae)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in done.model.vae.state_dict().items())
    with torch.no_grad():
        # The kernels of some processors round otherwise for weights that can have no gradient.
        assert sqnr_db(exact, done.model.vae.decode(given).sample) > 100
    assert is_quantized(done.model.unet)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ("vae", "leave out the denoiser"),
        ("denoiser,veil", "has no component veil; choose all, or of denoiser"),
    ],
)
def test_components_that_there_are_not_are_refused(
    family: Callable[[str], Any], recipe_of: Callable[[str], Recipe], components: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tfmq.quantize(opened(family("sd1").stock), recipe_of("sd1"), components=components)


def test_a_recipe_says_by_component_how_it_is_quantized(
    family: Callable[[str], Any], recipe_of: Callable[[str], Recipe]
) -> None:
    own = replace(
        image_w8a8(),
        name="own",
        rules=(Rule(match="conv_out", weights={"bits": None}),),
    )
    recipe = replace(brief(recipe_of("sd1")), components={"vae.dec*": own})
    done = tfmq.quantize(opened(family("sd1").stock), recipe, components="denoiser,vae")
    assert done.report["components"]["vae"]["networks"]["vae.decoder"]["scheme"] == "own"
    layers = packed_layers(done.model.vae.decoder)
    assert "up_blocks.0.resnets.0.conv1" in layers and "conv_out" not in layers


def test_an_outlier_leaves_the_layer_that_reads_it_in_float(
    family: Callable[[str], Any], recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    sampler = opened(family("sd1").stock)
    attention = sampler.pipeline.vae.decoder.mid_block.attentions[0]
    with torch.no_grad():
        # What follows divides by it again, so that the images are the same.
        attention.to_v.weight[0] *= 1000
        attention.to_v.bias[0] *= 1000
        attention.to_out[0].weight[:, 0] /= 1000
    given = latents(sampler, steps=STEPS)
    with torch.no_grad():
        exact = sampler.pipeline.vae.decode(given).sample
    done = tfmq.quantize(
        sampler, brief(recipe_of("sd1")), components="denoiser,vae", output_dir=tmp_path / "out"
    )
    found = done.report["components"]["vae"]["networks"]["vae.decoder"]["tolerance"]
    assert found["layers"]["mid_block.attentions.0.to_out.0"] < 5
    assert found["unspared_db"] < 30 <= found["output_db"]
    decoder = tfmq.load(tmp_path / "out", backend="torch").vae.decoder
    assert "mid_block.attentions.0.to_out.0" not in packed_layers(decoder)
    with torch.no_grad():
        assert sqnr_db(exact, tfmq.load(tmp_path / "out").vae.decode(given).sample) > 25


def test_a_pipeline_draws_what_it_brings_unless_it_is_asked_for_something_else(
    family: Callable[[str], Any], tmp_path: Path
) -> None:
    copytree(family("sd1").stock, tmp_path / "own")
    (tmp_path / "own" / PROMPTS_FILE).write_text(
        json.dumps(prompts_content(["a", "b"], {"guidance_scale": 2}))
    )
    own = open_sampler(tmp_path / "own")
    assert own.prompts == ("a", "b") and own.options["guidance_scale"] == 2
    assert open_sampler(tmp_path / "own", options={"guidance_scale": 5.0}).options["guidance_scale"] == 5
    assert open_sampler(tmp_path / "own", prompts=("c",)).prompts == ("c",)


def test_a_quantized_pipeline_goes_on_with_the_prompts_of_its_calibration(
    family: Callable[[str], Any],
) -> None:
    made = family("sd1")
    assert open_sampler(made.quantized).prompts == made.reference.prompts
    assert PROMPTS_FILE in json.loads((made.quantized / "tfmq_files.json").read_text())["files"]
