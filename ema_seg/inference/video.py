"""Segmentation of videos and cameras: masks and areas of the frames, and the overlay as a video."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ema_seg.inference.files import tell_left_out
from ema_seg.inference.results import Results
from ema_seg.inference.segmenter import Segmentation
from ema_seg.runtime.errors import ConfigError, DataError, EmaSegError
from ema_seg.runtime.escaping import for_terminal
from ema_seg.runtime.extras import install_command
from ema_seg.runtime.progress import CountedProgress

__all__ = ["segment_camera", "segment_videos"]

Container = Any
"""Open container of PyAV."""

# Encoder of each container for the overlays; a video in another container gets an overlay in .mp4.
_ENCODERS = {".avi": "libx264", ".m4v": "libx264", ".mkv": "libx264", ".mov": "libx264", ".webm": "libvpx-vp9"}
_OPTIONS = {"libx264": {"crf": "20", "preset": "veryfast"}, "libvpx-vp9": {"crf": "24", "b": "0", "cpu-used": "5"}}
# FFmpeg's input devices, and how they name the first camera.
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}


class _Unreadable(EmaSegError):
    """A video that cannot be decoded or predicted."""


def segment_videos(
    videos: Mapping[Path, str], results: Results, *, batch_size: int = 4, workers: int = 4, overwrite: bool = False
) -> list[str]:
    """Segment video files frame by frame, through PyAV.

    The first frame of ``clip.mp4`` has the mask ``masks/clip/000000.png`` and the row ``clip/000000`` in ``areas.csv``.
    The overlay is ``overlays/clip.mp4``, with the frames, times, size and sound of the video. Frames are upright, as in
    players. Videos whose results are there are left out. Decoding, encoding and writing take place beside the model.

    Args:
        videos: the videos with the names of their results; see ``find_files``.
        results: the results, which this process has claimed.
        batch_size: frames that are predicted together.
        workers: threads that write masks.
        overwrite: predict all videos.

    Returns:
        A sentence for each video that could not be read or predicted.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: a result cannot be written.
    """
    av = _import_av("source")
    problems: list[str] = []
    left_out = 0
    for video, name in videos.items():
        overlay = _overlay_path(results, name, video.suffix.lower())
        done = results.has_source(name, video) and overlay.is_file() and results.has_frame(f"{name}/000000")
        if done and not overwrite:
            left_out += 1
            continue
        try:
            with av.open(str(video)) as source:
                _segment(source, str(video), name, overlay, results, batch_size, workers)
            results.write_source(name, video)
        except (av.FFmpegError, _Unreadable) as error:
            problems.append(str(error) if isinstance(error, _Unreadable) else _unreadable(video, error))
    results.finish()
    tell_left_out(left_out)
    return problems


def segment_camera(
    number: int, results: Results, *, batch_size: int = 1, workers: int = 4, overwrite: bool = False
) -> None:
    """Segment the pictures of a camera until Ctrl-C; see ``segment_videos``.

    Args:
        number: 0 for the first camera.
        results: the results, which this process has claimed; their name is ``camera0``.
        batch_size: frames that are predicted together.
        workers: threads that write masks.
        overwrite: replace an earlier recording.

    Raises:
        ConfigError: PyAV is not installed, or cameras of this system are not supported.
        DataError: there is no such camera, there is a recording already, or a result cannot be written.
    """
    av = _import_av("source")
    name = f"camera{number}"
    overlay = _overlay_path(results, name, ".mp4")
    if overlay.is_file() and not overwrite:
        raise DataError(f"{overlay}: is there already; choose another out, or set overwrite=true.")
    if sys.platform not in _CAMERAS:
        raise ConfigError(f"source=camera:{number}: cameras of {sys.platform} are not supported; give a video file.")
    device, path = _CAMERAS[sys.platform]
    try:
        with av.open(path.format(number), format=device) as source:
            _segment(source, f"camera:{number}", name, overlay, results, batch_size, workers, endless=True)
    except av.FFmpegError as error:
        raise DataError(f"source={_unreadable(f'camera:{number}', error)}") from error
    except _Unreadable as error:
        raise DataError(f"source={error}") from error
    results.finish()


def _import_av(key: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigError(f"{key}: videos and cameras need PyAV; run {install_command('video')}.") from error
    av.logging.set_level(None)  # its errors are raised
    return av


def _unreadable(source: object, error: Exception) -> str:
    return f"{source}: cannot be read as a video ({getattr(error, 'strerror', None) or error}); give another."


def _overlay_path(results: Results, name: str, suffix: str) -> Path:
    own = Path(name).suffix.lower() == suffix  # names keep the suffix where two files differ in it alone
    suffix = suffix if suffix in _ENCODERS else ".mp4"
    return results.out / "overlays" / (name if own and name.endswith(suffix) else f"{name}{suffix}")


class _Batch(NamedTuple):
    """Consecutive frames, uint8 RGB H x W x 3, with their times, and the packets of sound among them."""

    images: list[NDArray[np.uint8]]
    times: list[int]
    sound: list[Any]


def _segment(
    source: Container,
    origin: str,
    name: str,
    path: Path,
    results: Results,
    batch_size: int,
    workers: int,
    *,
    endless: bool = False,
) -> None:
    """Segment the frames of an open video.

    Args:
        source: the video or camera.
        origin: its path, for messages.
        name: name of its results.
        path: path of the overlay, which is written whole or not.
        results: the results.
        batch_size: frames that are predicted together.
        workers: threads that write masks.
        endless: end at Ctrl-C, and keep what is there.

    Raises:
        _Unreadable: the video has no frames, cannot be decoded or predicted.
    """
    if not source.streams.video:
        raise _Unreadable(f"{origin}: has no video stream; give a video.")
    batches = _read(source, origin, batch_size)
    overlay: _Overlay | None = None
    frames = 0
    with ThreadPoolExecutor(1) as decoding, ThreadPoolExecutor(workers) as pool, CountedProgress() as progress:
        task = progress.add_task(name, total=source.streams.video[0].frames or None)
        following = decoding.submit(next, batches, None)
        try:
            with suppress(KeyboardInterrupt) if endless else nullcontext():
                while (batch := following.result()) is not None:
                    following = decoding.submit(next, batches, None)
                    overlay = overlay or _Overlay(path, source, batch.images[0].shape[:2])
                    for result, time in zip(results.segment(batch.images), batch.times, strict=True):
                        if isinstance(result, EmaSegError):
                            raise _Unreadable(f"{origin}: frame {frames}: {result}") from result
                        overlay.write(pool.submit(_write_frame, results, f"{name}/{frames:06}", result), time)
                        frames += 1
                    overlay.write_sound(batch.sound)
                    overlay.wait(4 * batch_size)
                    progress.update(task, completed=frames)
            if overlay is None:
                raise _Unreadable(f"{origin}: has no frames; give another video.")
            overlay.finish()
        except BaseException:
            if overlay is not None:
                overlay.discard()
            raise
    for codec in overlay.lost:
        print(for_terminal(f"{path}: without the sound, because {path.suffix} cannot hold {codec}"), file=sys.stderr)


def _write_frame(results: Results, name: str, result: Segmentation) -> NDArray[np.uint8]:
    """Write the results of a frame and return its overlay, H x W x 3."""
    results.write(name, result)
    return np.asarray(result.overlay(results.alpha))


def _read(source: Container, origin: str, size: int) -> Iterator[_Batch]:
    """Decode frames in batches. The last batch may have sound alone, unless it is the only one."""
    stream = source.streams.video[0]
    stream.thread_type = "AUTO"
    duration = round(1 / ((stream.average_rate or 25) * (stream.time_base or 1)))  # of a frame, in units of time_base
    batch, frames, last = _Batch([], [], []), 0, -duration
    for packet in source.demux(stream, *source.streams.audio):
        if packet.stream is not stream:
            if packet.dts is not None:  # None: the end of the stream
                batch.sound.append(packet)
            continue
        for frame in packet.decode():
            image = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            if batch.images and image.shape != batch.images[0].shape:
                raise _Unreadable(f"{origin}: the frames' size changes at frame {frames}; cut the video there.")
            # Encoders refuse times that do not grow.
            last = max(last + 1, last + duration if frame.pts is None else frame.pts)
            batch.images.append(np.ascontiguousarray(image))
            batch.times.append(last)
            frames += 1
            if len(batch.images) == size:
                yield batch
                batch = _Batch([], [], [])
    if batch.images or (batch.sound and frames):
        yield batch


class _Overlay:
    """Video with the sound of another one, encoded in a thread of its own.

    Args:
        path: path of the video, which is there when it is finished.
        source: the other video, for its rate and sound.
        size: height and width of the frames.

    Attributes:
        lost: codecs of sound that the container cannot hold.
    """

    def __init__(self, path: Path, source: Container, size: tuple[int, int]) -> None:
        import av

        self._path = path
        self._partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        original = source.streams.video[0]
        encoder = _ENCODERS.get(path.suffix, "libx264")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container: Container = av.open(str(self._partial), "w")
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._video = self._container.add_stream(encoder, rate=original.average_rate, options=_OPTIONS[encoder])
        self._video.height, self._video.width = size
        # H.264 halves the resolution of colours only where sides are even.
        halved = encoder != "libx264" or not (size[0] % 2 or size[1] % 2)
        self._video.pix_fmt = "yuv420p" if halved else "yuv444p"
        self._video.codec_context.time_base = original.time_base
        if original.sample_aspect_ratio and size == (original.height, original.width):
            self._video.codec_context.sample_aspect_ratio = original.sample_aspect_ratio
        known = self._container.supported_codecs
        self._sound = {
            sound.index: self._container.add_stream_from_template(sound)
            for sound in source.streams.audio
            if sound.codec_context.name in known
        }
        self.lost = [sound.codec_context.name for sound in source.streams.audio if sound.index not in self._sound]

    def write(self, frame: Future[NDArray[np.uint8]], time: int) -> None:
        """Append a frame when it is computed; ``time`` is in units of the source's time base."""
        self._submit(self._encode, frame, time)

    def write_sound(self, packets: Sequence[Any]) -> None:
        """Append packets of the source's sound."""
        for packet in packets:
            if packet.stream.index in self._sound:
                self._submit(self._mux_sound, packet)

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many frames are to be written.

        Raises:
            DataError: the video cannot be written.
        """
        import av

        try:
            while len(self._pending) > most:
                self._pending.popleft().result()
        except (av.FFmpegError, OSError) as error:
            raise _cannot_write(self._path, error) from error

    def finish(self) -> None:
        """Write what is left, and give the video its name."""
        self._submit(self._close)
        self.wait()
        self._thread.shutdown()
        self._partial.replace(self._path)

    def discard(self) -> None:
        """Stop, and remove what is written."""
        self._thread.shutdown(cancel_futures=True)
        with suppress(Exception):  # the error that led here says why
            self._container.close()
        self._partial.unlink(missing_ok=True)

    def _submit(self, call: Callable[..., None], *arguments: Any) -> None:
        self._pending.append(self._thread.submit(call, *arguments))

    def _encode(self, frame: Future[NDArray[np.uint8]], time: int) -> None:
        from av import VideoFrame

        picture = VideoFrame.from_ndarray(frame.result(), format="rgb24")
        picture.pts, picture.time_base = time, self._video.codec_context.time_base
        self._container.mux(self._video.encode(picture))

    def _mux_sound(self, packet: Any) -> None:
        packet.stream = self._sound[packet.stream.index]
        self._container.mux(packet)

    def _close(self) -> None:
        self._container.mux(self._video.encode())
        self._container.close()


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be written ({error.strerror or error}); free disk space or give permission.")
