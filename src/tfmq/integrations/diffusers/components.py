"""tfmq as a library of pipeline components: a pipeline directory names library and class of each, and
diffusers opens those of libraries it knows.
"""

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

LIBRARY = "tfmq"
# Names of classes, since diffusers' models may not have been imported yet; `tfmq` has them as attributes.
CLASSES = ("ClassEmbedder", "UNet2DHeadsModel")


def register_components() -> None:
    """Make diffusers know the classes, and how each is saved and loaded."""
    methods = {name: ["save_pretrained", "from_pretrained"] for name in CLASSES}
    LOADABLE_CLASSES[LIBRARY] = methods
    ALL_IMPORTABLE_CLASSES.update(methods)


register_components()
