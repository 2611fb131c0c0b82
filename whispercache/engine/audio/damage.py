"""
The damage of a recording: the parts that cannot be heard, by packets and timestamps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.packet import Packet

# Seconds that timestamps may leave out before that counts as missing: in containers
# that keep milliseconds, or times of arrival, they tremble.
JUMP_S = 0.1
# Beginnings of what stands between joined files and is no audio.
_TAGS = (b"ID3", b"TAG", b"APETAGEX")


@dataclass(frozen=True, slots=True)
class AudioDamage:
    """
    The losses of a recording, as far as its packets and timestamps tell.

    Times of what follows do not count it: they are that much earlier.

    Attributes:
        packets: Number of packets that could not be decoded, and were left out.
        broken_s: Seconds that these stand for, about.
        missing_s: Seconds that are not there at all: timestamps leave them out, or the
            header counts them. A recorder that was paused does that, too.
        breaks_off: Nothing more could be read at some point; it is not known of how
            much.
    """

    packets: int
    broken_s: float
    missing_s: float
    breaks_off: bool = False

    @property
    def lost_s(self) -> float:
        """
        The sum of both, in seconds.
        """
        return self.broken_s + self.missing_s

    def __str__(self) -> str:
        parts = []
        if self.packets:
            packets = "1 packet" if self.packets == 1 else f"{self.packets} packets"
            parts.append(
                f"about {self.broken_s:.1f} s could not be decoded ({packets})"
            )
        if self.missing_s:
            parts.append(f"{self.missing_s:.1f} s are missing, by its own times")
        if self.breaks_off:
            parts.append("it breaks off")
        return " and ".join(parts)


class Losses:
    """
    The losses of a stream, of whose packets *n_bytes* gave *heard_s* seconds.
    """

    def __init__(self) -> None:
        self.n_bytes: int = 0
        self.heard_s: float = 0.0
        self.packets: int = 0
        self.broken_s: float = 0.0
        self.missing_s: float = 0.0
        self.breaks_off: bool = False
        self._next_s: float | None = None
        self._largest_bytes = 0
        # Broken packets since the last one that was heard, and their seconds.
        self._stretch = 0
        self._stretch_s = 0.0
        self._is_tag = False

    def hear(self, frame: AudioFrame, packet: Packet[AudioStream]) -> None:
        """
        Counts a *frame* of *packet*; its time tells what is missing before it.
        """
        length_s = frame.samples / frame.sample_rate
        at_s, next_s = frame.time, self._next_s
        # Raw streams have no times: then each frame follows the one before.
        if at_s is None:
            at_s = next_s or 0.0
        gap_s = 0.0 if next_s is None else at_s - next_s
        self._next_s = at_s + length_s
        self.heard_s += length_s
        self._largest_bytes = max(self._largest_bytes, packet.size)
        if self._stretch:
            self._close(gap_s)
        elif gap_s > JUMP_S:
            self.missing_s += gap_s

    def lose(self, packet: Packet[AudioStream]) -> None:
        """
        Counts a packet that could not be decoded. The last one is empty: no loss.
        """
        # An empty packet makes the decoder give out its last frames.
        if not packet.size:
            return
        # The parts of a long tag come as packets, and only the first has its name.
        if not self._stretch:
            self._is_tag = bytes(packet).startswith(_TAGS)
        self._stretch += 1
        self._stretch_s += self._seconds(packet)

    def unhear(self, frame: AudioFrame) -> None:
        """
        Counts a *frame* that came of a broken packet after all.
        """
        length_s = frame.samples / frame.sample_rate
        # `hear` has counted it already.
        self.heard_s -= length_s
        self.broken_s += length_s
        self.packets += 1

    def total(self, promised_s: float) -> AudioDamage:
        """
        Returns all losses of a stream that lasts *promised_s* by its header.
        """
        if self._stretch:
            self._close(0.0)
        left_s = promised_s - self.heard_s - self.broken_s - self.missing_s
        if left_s > JUMP_S:
            self.missing_s += left_s
        return AudioDamage(self.packets, self.broken_s, self.missing_s, self.breaks_off)

    def _close(self, gap_s: float) -> None:
        # Over the stretch of broken packets, timestamps went by gap_s.
        if not self._is_tag:
            self.packets += self._stretch
            # Timestamps know better, but a joined file starts them anew.
            self.broken_s += max(gap_s, self._stretch_s)
        self._stretch, self._stretch_s = 0, 0.0

    def _seconds(self, packet: Packet[AudioStream]) -> float:
        """
        Returns the seconds that a broken packet would have lasted.

        Where a container has no packets of its own, as mp3, junk of any length comes as
        one packet, so its size decides.
        """
        # Much larger than any that was heard: junk, not one frame.
        if packet.size > 2 * self._largest_bytes and self.n_bytes:
            return packet.size * self.heard_s / self.n_bytes
        return float((packet.duration or 0) * (packet.time_base or 0))
