"""Video and audio by ffmpeg: test clips, muxing instead of HeyGen's lip-sync, and probing.

``imageio-ffmpeg`` brings ffmpeg but no ffprobe, so files are probed by the output of ``ffmpeg -i``.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    StrPath = str | PathLike[str]

# Codecs that an mp4 may contain; any other is encoded again.
_PICTURES_OF_MP4 = {"h264", "hevc", "av1", "vp9", "mpeg4"}
_SOUNDS_OF_MP4 = {"mp3", "aac", "opus", "flac", "alac"}
# FLAC stores PCM of these widths without loss, and browsers play it in an mp4.
_SOUNDS_OF_FLAC = {"pcm_u8", "pcm_s16le", "pcm_s24le"}

_X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
_TIMEOUT = 600


class MediaError(Exception):
    """A file that ffmpeg cannot read or write; the text becomes a job's ``failure_message``."""


@dataclass(frozen=True)
class Media:
    """Duration in seconds (to 0.01), ffmpeg's names of the codecs, and pixels; None without such a stream."""

    duration: float
    video_codec: str | None = None
    audio_codec: str | None = None
    width: int | None = None
    height: int | None = None


def ffmpeg_exe() -> str | None:
    """Return the path of ffmpeg, or None without ``imageio-ffmpeg`` or a binary for this platform."""
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def probe(path: StrPath) -> Media:
    """
    Read duration and streams of a file.

    :raises MediaError: if it is neither audio nor video.
    """
    # Without an output file, ffmpeg exits with 1 after it has printed the streams of the input.
    report = _ffmpeg("-i", path, check=False).stderr.decode(errors="replace")
    length = re.search(r"Duration: (\d+):(\d\d):(\d\d\.\d+)", report)
    if length is None:
        raise MediaError("Your video or audio is missing or corrupted")
    hours, minutes, seconds = length.groups()
    picture = re.search(r"Stream #0.*?: Video: (\w+).*?, (\d+)x(\d+)", report)
    sound = re.search(r"Stream #0.*?: Audio: (\w+)", report)
    return Media(
        duration=round(int(hours) * 3600 + int(minutes) * 60 + float(seconds), 2),
        video_codec=picture[1] if picture else None,
        audio_codec=sound[1] if sound else None,
        width=int(picture[2]) if picture else None,
        height=int(picture[3]) if picture else None,
    )


def make_video(
    path: StrPath, seconds: float = 2.0, *, width: int = 320, height: int = 180, hz: int = 440
) -> None:
    """Write a moving test picture (25 fps) with a tone; container and codecs by the suffix (.mp4, .webm)."""
    _ffmpeg(
        *("-f", "lavfi", "-i", f"testsrc2=size={width}x{height}:rate=25"),
        *("-f", "lavfi", "-i", f"sine=frequency={hz}"),
        # B-frames are stored out of order, so only without them is a copied cut exact.
        *("-t", f"{seconds}", "-pix_fmt", "yuv420p", "-bf", "0", path),
    )


def make_audio(path: StrPath, seconds: float = 2.0, hz: int = 880) -> None:
    """Write a tone; mp3, wav or m4a by the suffix."""
    _ffmpeg("-f", "lavfi", "-i", f"sine=frequency={hz}:sample_rate=44100", "-t", f"{seconds}", path)


def mux(
    video: StrPath,
    audio: StrPath,
    out: StrPath,
    *,
    start_time: float | None = None,
    end_time: float | None = None,
    dynamic_duration: bool = True,
) -> Media:
    """
    Replace the audio of a video: an overdub without lip-sync.

    The picture is copied, and so is mp3 or AAC audio; PCM becomes FLAC. In each case, the decoded audio of
    ``out`` equals that of ``audio``.

    :param start_time: start of the part of the video that gets the new audio, in seconds. The rest keeps its
        own audio, and the output is as long as the video.
    :param end_time: end of that part, in seconds.
    :param dynamic_duration: make the output as long as the audio, with the picture in a loop if necessary;
        otherwise, it is as long as the video.
    """
    picture, sound = probe(video), probe(audio)
    if picture.video_codec is None:
        raise MediaError("Your video is missing or corrupted")
    if sound.audio_codec is None:
        raise MediaError("Your video's audio is missing or corrupted")
    picture_as = ("-c:v", "copy") if picture.video_codec in _PICTURES_OF_MP4 else _X264
    source: tuple[str, ...] = ()
    length: tuple[str, ...] = ("-t", f"{picture.duration}")
    if start_time is not None or end_time is not None:
        begin, end = start_time or 0.0, picture.duration if end_time is None else end_time
        own = "[0:a:0]" if picture.audio_codec else f"anullsrc,atrim=0:{picture.duration},"
        mix = (
            f"{own}volume=0:enable='between(t,{begin},{end})'[own];"
            f"[1:a:0]atrim=0:{max(end - begin, 0.0)},adelay={begin * 1000:.0f}:all=1[new];"
            "[own][new]amix=inputs=2:duration=first:normalize=0[mix]"
        )
        sound_as: tuple[str, ...] = ("-filter_complex", mix, "-map", "0:v:0", "-map", "[mix]", "-c:a", "aac")
    else:
        codec = "flac" if sound.audio_codec in _SOUNDS_OF_FLAC else "aac"
        codec = "copy" if sound.audio_codec in _SOUNDS_OF_MP4 else codec
        sound_as = ("-map", "0:v:0", "-map", "1:a:0", "-c:a", codec)
        if dynamic_duration:
            # Only the picture is cut: lengths are known to 0.01 s, so copied audio could lose a packet.
            # (-shortest sometimes exceeds the length by seconds.)
            source, length = ("-stream_loop", "-1", "-t", f"{sound.duration}"), ()
    _ffmpeg(
        *source, "-i", video, "-i", audio, *sound_as, *picture_as, *length, "-movflags", "+faststart", out
    )
    return probe(out)


def decode_audio(path: StrPath) -> bytes:
    """Return the audio as mono signed 16-bit little-endian samples at 16 kHz, to compare files."""
    return _ffmpeg("-i", path, "-vn", "-ac", "1", "-ar", "16000", "-f", "s16le", "-").stdout


def decode_frames(path: StrPath) -> list[str]:
    """Return a digest of each decoded picture, to compare files."""
    report = _ffmpeg("-i", path, "-map", "0:v:0", "-f", "framemd5", "-").stdout.decode()
    return [line.rpartition(",")[2].strip() for line in report.splitlines() if not line.startswith("#")]


def _ffmpeg(*arguments: StrPath, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    exe = ffmpeg_exe()
    if exe is None:
        raise MediaError("ffmpeg is not installed: pip install 'airflow-provider-heygen[emulator]'")
    level = "error" if check else "info"
    command = [exe, "-hide_banner", "-nostdin", "-loglevel", level, "-y", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_TIMEOUT)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise MediaError(f"Processing took longer than {_TIMEOUT} s") from error
    if check and done.returncode:
        raise MediaError(f"Processing failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return done
