"""The real API in front of a dispatcher that paints: what it answers is drawn from the world, not generated."""

import io
import threading
from contextlib import contextmanager

from pusa_dist.media.stills import FramesZip
from pusa_dist.world.render import render
from pusa_dist.world.scene import scene
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import Artifact, JobStore
from tests.serve.api_support import open_service


def true_frames(request):
    """What the perfect model answers."""
    return render(scene(request.seed, "held-out"), request.num_frames)


@contextmanager
def painting_service(folder, paint=true_frames):
    """Yields the service; its jobs are completed with the frames ``paint`` makes of their requests."""
    with open_service(folder, poll_after_ms=50) as service:
        painter = Painter(service.gateway.config, paint)
        painter.start()
        try:
            yield service
        finally:
            painter.stop()


class Painter(threading.Thread):
    def __init__(self, config, paint):
        super().__init__(daemon=True)
        self._config, self._paint = config, paint
        self._stop_asked = threading.Event()

    def run(self):
        store = JobStore(self._config.resolved_database_url)
        artifacts = ArtifactStore(self._config.resolved_artifacts_url)
        while not self._stop_asked.wait(0.02):
            for queued in store.queued(self._config.model, 10):
                job = store.claim(queued.id, "painter", 60.0)
                data = as_zip(self._paint(job.request))
                key = f"jobs/{job.id}/frames.zip"
                artifacts.put(key, data)
                frames = Artifact(key=key, content_type="application/zip", num_bytes=len(data))
                store.complete(job.id, job.attempt, {"frames": frames, "video": frames}, {})
        store.close()

    def stop(self):
        self._stop_asked.set()
        self.join()


def as_zip(frames):
    buffer = io.BytesIO()
    archive = FramesZip(buffer)
    archive.write(frames)
    archive.close()
    return buffer.getvalue()
