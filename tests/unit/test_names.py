import pytest

from modelcask.errors import InvalidName
from modelcask.names import ModelName, namespace_from_folder_name


@pytest.mark.parametrize(
    ("text", "full", "path"),
    [
        ("flux", "library/flux:latest", "registry.ollama.ai/library/flux/latest"),
        ("flux:int4", "library/flux:int4", "registry.ollama.ai/library/flux/int4"),
        ("org/flux.1-dev:x_y", "org/flux.1-dev:x_y", "registry.ollama.ai/org/flux.1-dev/x_y"),
        ("hub.example/org/flux", "hub.example/org/flux:latest", "hub.example/org/flux/latest"),
    ],
)
def test_a_name_is_completed_by_its_defaults(text: str, full: str, path: str) -> None:
    name = ModelName.parse(text)
    assert str(name) == full
    assert str(name.path) == path


def test_the_default_host_is_left_out_of_the_views() -> None:
    assert str(ModelName.parse("org/flux").view_path) == "org/flux/latest"
    assert str(ModelName.parse("hub.example/org/flux").view_path) == "hub.example/org/flux/latest"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        "../x",
        "a/../b",
        "/etc/passwd",
        "a/b/c/d",
        "a//b",
        ".hidden",
        "-x",
        "x:",
        "x:..",
        "x:a/b",
        "a b",
        "a\0b",
        "a\nb",
        "é",
        "a.b/model",
        "x" * 81,
        "x:" + "y" * 81,
        "x\u202e",
    ],
)
def test_what_the_rules_forbid_is_refused(text: str) -> None:
    with pytest.raises(InvalidName) as caught:
        ModelName.parse(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("FLUX.1 [schnell]", "FLUX.1--schnell-"), (".hidden", "hidden"), ("ä-model", "model"), ("x" * 300, "x" * 80)],
)
def test_a_folder_name_gives_a_model_name(folder: str, name: str) -> None:
    assert ModelName.from_folder_name(folder).name == name


def test_a_folder_name_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(InvalidName, match="--name"):
        ModelName.from_folder_name("...")


def test_a_folder_of_models_gives_a_namespace() -> None:
    assert namespace_from_folder_name("stability.ai") == "stability-ai"
    assert ModelName.parse(f"{namespace_from_folder_name('.ä b')}/x").namespace
