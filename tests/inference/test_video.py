"""Tests of the segmentation of videos and cameras."""

import csv
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from ema_seg.inference import video
from ema_seg.inference.files import find_files
from ema_seg.inference.results import Results
from ema_seg.inference.video import segment_camera, segment_videos
from ema_seg.runtime.errors import DataError

RATE = Fraction(30000, 1001)


def write_video(path, size=(48, 64), *, times=range(6), sound=None, rotation=0, codec="libx264"):
    """Write a video whose frames have a bright upper left quarter, and silence of its length."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p" if codec != "libx264" or not (size[0] % 2 or size[1] % 2) else "yuv444p"
        stream.codec_context.time_base = 1 / RATE
        if rotation:
            stream.set_display_rotation(rotation)
        audio = sound and container.add_stream(sound, rate=48000)
        container.start_encoding()
        for index, time in enumerate(times):
            image = np.full((*size, 3), 10 * index, np.uint8)
            image[: size[0] // 2, : size[1] // 2] = 230
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, 1 / RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 9600), np.float32), format="fltp", layout="stereo")
            silence.rate, silence.pts = 48000, 0
            for frame in av.AudioResampler(frame_size=audio.codec_context.frame_size).resample(silence):
                container.mux(audio.encode(frame))
            container.mux(audio.encode())


def read_video(path):
    """Return the upright frames with their times in seconds, and the packets of the sound."""
    with av.open(str(path)) as container:
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        sound = [bytes(packet) for packet in container.demux(audio=0)] if container.streams.audio else []
    return frames, sound


def predict(segmenter, source, out, *, overwrite=False, **details):
    results = Results(out, segmenter, **details)
    results.claim({"model": "mine"}, overwrite=overwrite)
    return segment_videos(find_files(str(source), out), results, batch_size=4, overwrite=overwrite)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("clip.mp4", (48, 64), {"sound": "aac"}),
        ("clip.mov", (48, 64), {"times": (0, 1, 5, 6, 20, 21)}),  # a variable rate
        ("clip.mkv", (45, 63), {"sound": "libopus"}),
        ("clip.webm", (45, 63), {"codec": "libvpx-vp9", "sound": "libopus"}),
    ],
)
def test_an_overlay_has_the_frames_times_size_and_sound_of_its_video(segmenter, tmp_path, name, size, options):
    write_video(tmp_path / name, size, **options)

    assert predict(segmenter, tmp_path / name, tmp_path / "out") == []

    frames, sound = read_video(tmp_path / name)
    overlays, kept = read_video(tmp_path / "out" / "overlays" / name)
    assert [frame.shape for frame, _ in overlays] == [(*size, 3)] * 6
    assert [time for _, time in overlays] == pytest.approx([time for _, time in frames], abs=0.001)
    assert kept == sound
    assert bool(sound) == ("sound" in options)


def test_masks_and_areas_are_those_of_the_frames(segmenter, tmp_path):
    write_video(tmp_path / "clip.mp4")

    predict(segmenter, tmp_path / "clip.mp4", tmp_path / "out", probabilities=True)

    rows = list(csv.reader((tmp_path / "out" / "areas.csv").open(newline="")))[1:]
    assert [row[0] for row in rows] == [f"clip/{index:06}" for index in range(6)]
    overlays, _ = read_video(tmp_path / "out" / "overlays" / "clip.mp4")
    for index, (frame, _) in enumerate(read_video(tmp_path / "clip.mp4")[0]):
        expected = segmenter(frame, probabilities=True)
        assert np.array_equal(np.array(Image.open(tmp_path / f"out/masks/clip/{index:06}.png")), expected.mask)
        found = np.load(tmp_path / f"out/probabilities/clip/{index:06}.npz")["probabilities"]
        assert np.array_equal(found, expected.probabilities)
        assert [float(area) for area in rows[index][1:]] == pytest.approx(list(expected.areas().values()), abs=1e-6)
        assert np.abs(overlays[index][0] - np.array(expected.overlay(), np.int16)).mean() < 8  # H.264 is lossy


def test_frames_of_a_turned_video_are_upright(segmenter, tmp_path):
    write_video(tmp_path / "clip.mov", rotation=90)

    predict(segmenter, tmp_path / "clip.mov", tmp_path / "out", alpha=0.0)

    frame, _ = read_video(tmp_path / "out" / "overlays" / "clip.mov")[0][0]
    assert frame.shape == (64, 48, 3)
    # A turn by 90° counter-clockwise brings the upper left quarter to the lower left.
    assert frame[40:, :16].mean() > 200 and frame[:24, :16].mean() < 60


def test_the_same_call_leaves_out_what_is_there(segmenter, tmp_path, monkeypatch):
    (tmp_path / "both").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / "both" / name)
    predict(segmenter, tmp_path / "both" / "a.mp4", tmp_path / "out")
    batches = []
    batch = segmenter.segment_batch
    monkeypatch.setattr(segmenter, "segment_batch", lambda images: batches.append(images) or batch(images))

    predict(segmenter, tmp_path / "both", tmp_path / "out")
    assert [len(images) for images in batches] == [4, 2]
    predict(segmenter, tmp_path / "both", tmp_path / "out", overwrite=True)
    assert len(batches) == 6


def test_an_interrupted_video_leaves_no_overlay(segmenter, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(segmenter, "segment_batch", interrupt)

    with pytest.raises(KeyboardInterrupt):
        predict(segmenter, tmp_path / "clip.mp4", tmp_path / "out")
    assert list((tmp_path / "out" / "overlays").iterdir()) == []


def test_videos_that_cannot_be_read_are_named_and_the_others_are_predicted(segmenter, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_video(source / "good.mp4")
    (source / "damaged.mp4").write_bytes((source / "good.mp4").read_bytes()[:900])
    write_video(source / "empty.avi", times=())
    (source / "text.mp4").write_text("no video")
    with av.open(str(source / "sound.mp4"), "w") as container:
        container.add_stream("aac", rate=48000)
        container.start_encoding()

    problems = predict(segmenter, source, tmp_path / "out")

    assert len(problems) == 4
    assert all(problem.startswith(str(source)) and problem.count("\n") == 0 for problem in problems)
    assert "empty.avi: has no frames" in problems[1] and "sound.mp4: has no video stream" in problems[2]
    assert [file.name for file in (tmp_path / "out" / "overlays").iterdir()] == ["good.mp4"]


def test_a_full_disk_ends_the_command(segmenter, tmp_path):
    write_video(tmp_path / "clip.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "overlays").touch()

    with pytest.raises(DataError, match=r"overlays.clip\.mp4: cannot be written"):
        predict(segmenter, tmp_path / "clip.mp4", tmp_path / "out")


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_camera_is_recorded_until_it_is_interrupted(segmenter, tmp_path, monkeypatch):
    # FFmpeg's test picture stands for the camera.
    monkeypatch.setattr(video, "_CAMERAS", {video.sys.platform: ("lavfi", "testsrc=size=64x48:rate=25,crop=64:48:{}")})
    results = Results(tmp_path / "out", segmenter)
    results.claim({"model": "mine"})
    batch, seen = segmenter.segment_batch, []
    monkeypatch.setattr(
        segmenter,
        "segment_batch",
        lambda images: seen.append(images) or (batch(images) if len(seen) < 8 else interrupt()),
    )

    segment_camera(0, results)

    frames, _ = read_video(tmp_path / "out" / "overlays" / "camera0.mp4")
    assert len(frames) == 7
    assert np.diff([time for _, time in frames]) == pytest.approx([0.04] * 6)
    assert len(list((tmp_path / "out" / "masks" / "camera0").iterdir())) == 7
    with pytest.raises(DataError, match=r"camera0\.mp4: is there already"):
        segment_camera(0, results)


def test_a_missing_camera_is_one_sentence(segmenter, tmp_path):
    with pytest.raises(DataError, match=r"source=camera:9: cannot be read as a video \(.*\)"):
        segment_camera(9, Results(tmp_path, segmenter))
