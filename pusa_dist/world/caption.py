"""The sentence that describes a scene."""

from pusa_dist.world.scene import Scene


def caption(scene: Scene) -> str:
    """Describe a scene, e.g. "a large red circle moves quickly right on a gray background"."""
    return (
        f"a {scene.size} {scene.colour} {scene.shape} moves {scene.speed} {scene.direction} "
        f"on a {scene.background} background"
    )
