"""Clips written with PyAV, whose frames can be told apart and whose sound is a sine."""

from fractions import Fraction

import av
import numpy as np
import torch


def write_clip(
    path,
    frames=20,
    size=(64, 48),
    video="mpeg4",
    audio=None,
    rate=16000,
    layout="mono",
    seconds=None,
    audio_first=False,
    frequency=440.0,
    levels=(0.5,),
    times=None,
    options=None,
    aspect=None,
):
    """A clip whose frame i is grey of brightness 10 i (blue left half), and a sine for sound.

    levels: its amplitude in each channel. times: when each frame comes, in 1/25 s. aspect: width of
    a pixel / its height.
    """
    with av.open(str(path), "w", options=options or {}) as out:
        streams = {}
        for kind in ("audio", "video") if audio_first else ("video", "audio"):
            if kind == "video" and video:
                stream = streams[kind] = out.add_stream(video, rate=25)
                stream.width, stream.height = size
                stream.pix_fmt = "yuvj420p" if video == "mjpeg" else "yuv420p"
                stream.bit_rate = 2_000_000
                if aspect:
                    stream.codec_context.sample_aspect_ratio = aspect
            elif kind == "audio" and audio:
                streams[kind] = out.add_stream(audio, rate=rate, layout=layout)
        if video:
            _write_frames(out, streams["video"], times or range(frames))
        if audio:
            count = int(rate * (frames / 25 if seconds is None else seconds))
            wave = np.sin(2 * np.pi * frequency * np.arange(count) / rate)
            write_sound(out, streams["audio"], np.stack([level * wave for level in levels], 1))
    return path


def _write_frames(out, stream, times):
    for i, time in enumerate(times):
        picture = np.full((stream.height, stream.width, 3), 10 * i % 250, np.uint8)
        picture[:, : stream.width // 2, 2] = 255
        write_picture(out, stream, picture, time)
    out.mux(stream.encode())


def write_picture(out, stream, picture, time):
    """One frame (h, w, 3) uint8 RGB, at a time in 1/25 s."""
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame.pts, frame.time_base = time, Fraction(1, 25)
    out.mux(stream.encode(frame))


def write_sound(out, stream, samples):
    """(samples, channels) of any number of channels: packed, as PyAV writes planes of up to 7."""
    rate, layout = stream.rate, stream.layout.name
    packed = samples.astype(np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    fifo = av.AudioFifo()
    fifo.write(frame)
    step = stream.codec_context.frame_size or 1024
    resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
    while chunk := fifo.read(step, partial=True):
        for piece in resampler.resample(chunk):
            out.mux(stream.encode(piece))
    out.mux(stream.encode())


def copy_streams(source, target, change=lambda packet: True, options=None):
    """Copy a clip's packets without encoding them anew, as ffmpeg -c copy does.

    change may alter a packet, and says whether it stays.
    """
    with av.open(str(source)) as whole, av.open(str(target), "w", options=options or {}) as out:
        copies = {stream: out.add_stream_from_template(stream) for stream in whole.streams}
        for packet in whole.demux():
            if packet.size and change(packet):
                packet.stream = copies[packet.stream]
                out.mux(packet)
    return target


def brightness(frames):
    """Which frame each one is: the red channel at the right, 10 levels a frame."""
    return (frames[:, 0, 8:-8, -16:-8].float().mean((1, 2)) / 10).round().int().tolist()


def sine_peak(waveform):
    """Frequency (Hz) and amplitude of the strongest sine in the middle of a waveform."""
    middle = waveform[len(waveform) // 4 : 3 * len(waveform) // 4]
    spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs()
    return spectrum.argmax().item() * 16000 / len(middle), middle.abs().max().item()
