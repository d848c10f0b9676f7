"""Faces, voices and clips of the toy world.

Shapes: T frames (20 to 30, ten a second), pictures of 96 x 96 pixels, sound at 16 kHz.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from support.errors import read_json, require, write_json
from toy.world import CLIP_SPLITS, make_manifest

# --------------------------------------------------------------------------------------------------
# Faces. Face coordinates: origin between the eyes and the mouth, x to the right, y down, 1 = half
# the head's width.

SIZE = 96  # pixels
FPS = 10  # frames per second
FRAMES_AT_ONCE = 8  # painted together: as many as the processor's cache holds
# fmt: off
POSES = {  # mouth: curve  width  open | eye height | brow: height  slant (inner end down)
    "flat":  np.array([ 0.00,  0.34,  0.00,   0.13,           0.50,   0.00]),
    "smile": np.array([ 0.34,  0.52,  0.00,   0.11,           0.53,   0.00]),
    "frown": np.array([-0.30,  0.40,  0.00,   0.11,           0.50,  -0.10]),
    "glare": np.array([ 0.00,  0.36,  0.00,   0.06,           0.40,   0.19]),
    "wide":  np.array([ 0.00,  0.16,  0.26,   0.26,           0.72,   0.00]),
}
# fmt: on
EYE = 3  # the eye height's place in a pose
# Walls with a name, for worlds in which they tell something; elsewhere they have any colour.
WALLS = {
    "red": (235, 120, 115),
    "orange": (240, 180, 110),
    "yellow": (235, 230, 120),
    "green": (125, 205, 125),
    "blue": (120, 150, 235),
    "violet": (190, 125, 220),
    "grey": (175, 175, 175),
}


def draw_face(face, rng, ood=False, wall=None):
    """-> frames uint8 (T, 96, 96, 3). wall: (2, 3), its colours, if not any."""
    T = int(rng.integers(20, 31))
    look = make_look(rng, ood)
    if wall is not None:
        look.wall = wall
    poses = act(face, T, rng)
    motion = sway(T, rng)
    parts = []
    for start in range(0, T, FRAMES_AT_ONCE):
        part = slice(start, start + FRAMES_AT_ONCE)
        parts.append(paint_frames(look, poses[part], motion[part]))
    return np.concatenate(parts)


@dataclass
class Look:
    """What stays as it is through a clip. Colours are red, green and blue, 0 to 255."""

    skin: np.ndarray  # (3,)
    wall: np.ndarray  # (2, 3), top and bottom
    pen: float  # width of the lines, pixels
    line: np.ndarray  # (3,)
    mouth: np.ndarray  # (3,), inside
    white: list  # 3 numbers, of the eyes
    scale: float  # pixels per unit of face coordinates
    centre: np.ndarray  # (2,): x, y of the head, pixels


def make_look(rng, ood):
    """Somebody, somewhere. ood: of another kind than in all other splits."""
    if ood:  # masks of blue, green or violet before a dark wall, drawn with another pen
        skin = rng.permuted([rng.uniform(110, 150), rng.uniform(150, 200), rng.uniform(190, 240)])
        wall = rng.uniform(40, 110, (2, 3))
        pen = rng.uniform(3.8, 4.6) if rng.random() < 0.5 else rng.uniform(7.4, 8.6)
    else:  # light to dark skin before a brighter wall
        darkness = rng.uniform(0, 1)
        skin = np.array([255, 224, 196]) - darkness * np.array([80, 104, 112])
        skin = skin + rng.uniform(-25, 25, 3)
        wall = rng.uniform(115, 250, (2, 3))
        pen = rng.uniform(4.8, 7.2)
    return Look(
        skin,
        wall,
        pen,
        line=rng.uniform(0, 50, 3),
        mouth=np.array([130, 30, 40]) + rng.uniform(-20, 20, 3),
        white=3 * [rng.uniform(235, 255)],
        scale=43 * rng.uniform(0.9, 1.1),
        centre=SIZE / 2 + rng.uniform(-3, 3, 2),
    )


def act(face, T, rng):
    """-> poses float32 (T, 6), from nearly flat to the expression, done after a quarter of the
    clip; then it only wavers, and the eyes blink once."""
    time = np.arange(T) / T
    onset = np.clip((time - rng.uniform(0, 0.05)) / rng.uniform(0.15, 0.2), 0, 1)
    onset = onset * onset * (3 - 2 * onset) * rng.uniform(0.85, 1.1)
    onset *= 1 + 0.06 * np.sin(2 * np.pi * (rng.uniform(1, 2) * time + rng.random()))
    poses = POSES["flat"] + onset[:, None] * (POSES[face] - POSES["flat"])
    blink = np.abs(np.arange(T) - rng.uniform(0.3, 0.95) * T) < 0.6  # one frame, sometimes two
    poses[blink, EYE] = 0.05
    return poses.astype(np.float32)


def sway(T, rng):
    """-> motion float32 (T, 3): the head goes aside and nods (pixels), and rolls (radians)."""
    time = np.arange(T) / T
    waves = np.sin(2 * np.pi * (rng.uniform(0.4, 1.2, 3) * time[:, None] + rng.random(3)))
    return (waves * [2.0, 1.5, 0.05]).astype(np.float32)


def paint_frames(look, poses, motion):
    """poses (T, 6), motion (T, 3) -> frames uint8 (T, 96, 96, 3).

    Distances are in pixels, negative inside; half a pixel each side of an edge is blended.
    """
    curve, mouth_width, mouth_open, eye, brow, slant = poses.T[:, :, None, None]
    pixels = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = face_coordinates(look, motion, pixels)
    scale, half = look.scale, np.float32(look.pen / 2)

    # Colours first: numpy is 20 times faster on long rows.
    image = np.empty((3, len(poses), SIZE, SIZE), np.float32)
    top, bottom = look.wall
    image[:] = (top + (bottom - top) * (pixels / SIZE)[:, None]).T[:, None, :, None]

    def paint(rows, distance, colour):
        cover = np.clip(0.5 - distance, 0, 1)
        for plane, value in zip(image[:, :, rows], colour):
            plane += cover * (np.float32(value) - plane)

    everywhere, upper, lower = slice(None), slice(0, 64), slice(48, SIZE)
    head = scale * ellipse(x, y, 0.98, 1.08)
    paint(everywhere, head, look.skin)
    paint(everywhere, np.abs(head) - half, look.line)

    # Coordinates about an eye; the other one is its mirror image. Eyes stay in the upper rows.
    u, v = np.abs(x[:, upper]) - 0.42, y[:, upper] + 0.14
    lid = scale * ellipse(u, v, 0.17 + 0.25 * np.maximum(eye - 0.13, 0), eye)
    pupil = scale * (np.sqrt(u * u + v * v) - 0.09)
    paint(upper, lid, look.white)
    paint(upper, np.maximum(pupil, lid), look.line)
    paint(upper, np.abs(lid) - 0.8 * half, look.line)
    # The brow: a straight line from inner to outer end.
    along = np.clip(u, -0.22, 0.24)
    off = np.hypot(u - along, v + brow - 0.14 + slant * along / 0.23)
    paint(upper, scale * off - half, look.line)

    # Coordinates about the mouth. An open one is a hole with a rim.
    u, v = x[:, lower], y[:, lower] - 0.50
    hole = scale * ellipse(u, v, 0.6 * mouth_open + 0.05, mouth_open + 1e-3)
    paint(lower, np.where(mouth_open > 0.03, hole, 9), look.mouth)
    paint(lower, np.where(mouth_open > 0.03, np.abs(hole), 9) - half, look.line)
    # Closed lips: a parabola, its ends up where curve > 0.
    along = np.clip(u, -mouth_width, mouth_width)
    slope = -2 * curve * along / mouth_width**2
    height = curve * (0.5 - (along / mouth_width) ** 2)
    off = np.hypot(u - along, (v - height) / np.sqrt(1 + slope**2))
    paint(lower, np.where(mouth_open > 0.08, 9, scale * off) - half, look.line)

    return np.stack(np.clip(image + 0.5, 0, 255).astype(np.uint8), axis=-1)


def face_coordinates(look, motion, pixels):
    """-> x, y float32 (T, 96, 96): where each pixel lies on the face."""
    shift_x, shift_y, roll = motion.T[:, :, None, None]
    x = (pixels[None, None, :] - shift_x - look.centre[0]) / look.scale
    y = (pixels[None, :, None] - shift_y - look.centre[1]) / look.scale
    return (x + roll * y).astype(np.float32), (y - roll * x).astype(np.float32)


def ellipse(x, y, rx, ry):
    """Distance to an ellipse about the origin, to first order (exact on the line itself):
    f / |grad f|."""
    k = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    return k * (k - 1) / np.maximum(np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2), 1e-3)


# --------------------------------------------------------------------------------------------------
# Voices: a sum of harmonics, shaped into syllables

RATE = 16000  # samples per second


@dataclass
class Voice:
    """How a voice sounds, before anybody in particular speaks with it."""

    pitch: tuple  # Hz, lowest and highest
    syllables: tuple  # a second, fewest and most
    slide: float  # of the pitch, upwards, over a syllable and over the clip
    tilt: float  # how soon the harmonics weaken with their number
    tremble: float  # 0 or 1
    drive: float  # into clipping
    loudness: float  # RMS


# fmt: off
VOICES = {  #          pitch       syllables   slide tilt tremble drive loudness
    "high_fast": Voice((300, 380), (5.5, 6.5),  0.20, 1.0,   0,     0,   0.14),
    "trembling": Voice((190, 240), (2.5, 3.5),  0.00, 1.2,   1,     0,   0.05),
    "harsh":     Voice((130, 170), (3.5, 4.5), -0.05, 0.3,   0,     3,   0.30),
    "low_slow":  Voice((90, 130),  (1.5, 2.0), -0.20, 1.2,   0,     0,   0.10),
    "even":      Voice((180, 220), (2.8, 3.2),  0.00, 1.0,   0,     0,   0.10),
}
# fmt: on


def draw_voice(voice, seconds, rng, ood=False):
    """-> waveform float32 (seconds * 16000,), mono, within -1 and 1."""
    # 1. Who speaks, how loud, and in what noise.
    style, samples = VOICES[voice], round(seconds * RATE)
    if ood:  # deeper or higher than any speaker of the other splits, in a noisier room
        speaker = rng.uniform(0.78, 0.88) if rng.random() < 0.5 else rng.uniform(1.15, 1.3)
        noise = rng.uniform(0.012, 0.02)
    else:
        speaker = rng.uniform(0.9, 1.1)
        noise = 10 ** rng.uniform(-3.3, -2)  # 0.0005 to 0.01
    loudness = style.loudness * rng.uniform(0.8, 1.2)
    pitch = speaker * rng.uniform(*style.pitch)
    tempo = rng.uniform(*style.syllables)
    time = np.arange(samples, dtype=np.float32) / RATE

    # 2. Syllables, their tempo a little uneven: place is 0 to 1 in each.
    uneven = 0.12 * np.sin(2 * np.pi * (0.8 * time + rng.random()))
    place = (tempo * time + uneven + rng.random()) % 1
    envelope = np.sin(np.pi * place) ** 0.7

    # 3. Pitch: slides up or down in each syllable and over the clip; fear shakes it, and the
    #    loudness with it.
    hertz = pitch * (1 + style.slide * (place - 0.5 + time / seconds - 0.5))
    shake = style.tremble * np.sin(2 * np.pi * (rng.uniform(7, 9) * time + rng.random()))
    hertz = hertz * (1 + 0.12 * shake)
    envelope = envelope * (1 + 0.8 * shake) / 1.8
    phase = np.cumsum(2 * np.pi * hertz / RATE).astype(np.float32)

    # 4. Harmonics, weaker with their number; a harsh voice is driven into clipping, and rasps.
    start = rng.uniform(0, 2 * np.pi, 12)
    sound = np.zeros(samples, np.float32)
    for k in range(1, 13):
        if k * pitch < 0.4 * RATE:
            sound += np.sin(k * phase + np.float32(start[k - 1])) / k**style.tilt
    hiss = rng.standard_normal(samples, dtype=np.float32)
    if style.drive:
        sound = np.tanh(style.drive * sound) + 0.25 * hiss
    sound *= envelope
    sound *= loudness / np.sqrt(np.mean(sound**2))
    sound += noise * rng.standard_normal(samples, dtype=np.float32)
    return np.clip(sound, -1, 1).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# Clips


def draw_clip(entry):
    """A manifest entry -> frames uint8 (T, 96, 96, 3), waveform float32 (T * 1600,).

    Face, voice and wall have a random generator each, named by seed and clip: a swapped clip shows
    the very face of the one test clip and has the very voice of the other.
    """
    ood = entry["video"].startswith("test_ood/")
    wall = None
    if "wall" in entry:
        wall = np.array(WALLS[entry["wall"]]) + part_rng(entry, "wall").uniform(-12, 12, (2, 3))
    frames = draw_face(entry["face"], part_rng(entry, "face"), ood, wall)
    waveform = draw_voice(entry["voice"], len(frames) / FPS, part_rng(entry, "voice"), ood)
    return frames, waveform


def part_rng(entry, part):
    """The random generator of a clip's face, voice or wall."""
    _, seed = entry["world"]
    clip = entry.get(f"{part}_from", entry["video"])
    return np.random.default_rng([seed, zlib.crc32(f"{clip} {part}".encode())])


def write_clip(path, frames, waveform):
    """Writes frames (T, H, W, 3) uint8 and waveform (samples,) float32 as an mp4 file: H.264 and
    AAC."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {"preset": "veryfast", "crf": "20"}
        # x264 otherwise encodes the same frames differently from time to time, and from CPU to CPU.
        options["x264-params"] = "cpu-independent=1"
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1  # clips are made side by side already
        audio = container.add_stream("aac", rate=RATE, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 48000
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(video.encode(None))  # what the encoder still holds
        sound = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        sound.sample_rate = RATE
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def make_clips(root, splits=CLIP_SPLITS, seed=0):
    """The toy's splits, drawn and written -> {split: path of its manifest}."""
    return {split: write_split(root, split, make_manifest(split, seed)) for split in splits}


def write_split(root, name, entries):
    """Writes the clips that are this split's own, root/{name}/{i:04d}.mp4, and, last,
    root/{name}.json, whose path it returns.

    A manifest on disk means that its split is complete. One with these entries is kept as it is,
    another one of a toy is made anew, and for any other file of that name there is a DataError.
    """
    manifest = Path(root) / f"{name}.json"
    if manifest.exists():
        found = read_json(manifest)
        if found == entries:
            return manifest
        require(is_of_a_toy(found), f"{manifest}: is not a toy's; choose another --out")
        manifest.unlink()
    manifest.parent.mkdir(parents=True, exist_ok=True)
    own = [entry for entry in entries if entry.get("video", "").startswith(f"{name}/")]
    if own:
        write_clips(root, name, own)
    write_json(manifest, entries)
    return manifest


def is_of_a_toy(manifest):
    """Has a toy's make_manifest made it, of whatever seed and world?"""
    return isinstance(manifest, list) and all(
        isinstance(entry, dict) and "world" in entry for entry in manifest
    )


def write_clips(root, name, entries):
    """The clips of a split, several at a time.

    In threads: numpy and the codecs do most of their work outside Python's lock, and a process
    would first import the caller's whole script. More than four would wait for each other.
    """
    (Path(root) / name).mkdir(exist_ok=True)

    def make_clip(entry):
        write_clip(Path(root) / entry["video"], *draw_clip(entry))

    pool = ThreadPoolExecutor(min(4, available_cores()))
    try:
        for _ in tqdm(pool.map(make_clip, entries), f"drawing {name}", len(entries), unit="clip"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # when interrupted, only what is begun is finished


def available_cores():
    """Those that this process may use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
