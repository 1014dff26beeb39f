"""Generates telephone keypad tones (DTMF) and their spectra with NumPy.

The tone of a key is the sum of two sine waves, one for its row and one for its column. Start, duration, volume of each
wave, phases, a small detuning and noise are random.
"""

from __future__ import annotations

import numpy as np

SAMPLE_RATE = 8000  # Hz, that of telephones
FRAME = 256  # samples, or 32 ms, which resolves 697 Hz and 770 Hz
FRAMES = 8
_ROWS = (697.0, 770.0, 852.0, 941.0)
_COLUMNS = (1209.0, 1336.0, 1477.0)
_KEYS = "123456789*0#"
FREQUENCIES = {int(key): (_ROWS[place // 3], _COLUMNS[place % 3]) for place, key in enumerate(_KEYS) if key.isdecimal()}
"""Digit -> the frequencies of its two waves in Hz."""

_BAND = slice(20, 52)  # bins of 31.25 Hz of the spectrum: 625 to 1594 Hz
BINS = _BAND.stop - _BAND.start
_WINDOW = np.hanning(FRAME)
_TIME = np.arange(FRAME * FRAMES) / SAMPLE_RATE


def tone(key: int, chance: np.random.Generator) -> np.ndarray:
    """Generate a clip of 0.256 s with a tone of 80 to 200 ms and noise.

    Args:
        key: digit of the key.
        chance: random generator for everything that differs between two clips of the same key.

    Returns:
        float64 [FRAMES * FRAME], amplitude about 1.
    """
    lasts = chance.uniform(0.08, 0.2)
    begins = chance.uniform(0, _TIME[-1] - lasts)
    wave = np.zeros(len(_TIME))
    for frequency in FREQUENCIES[key]:
        detuned = frequency * (1 + chance.uniform(-0.015, 0.015))
        wave += chance.uniform(0.5, 1.0) * np.sin(2 * np.pi * (detuned * _TIME + chance.random()))
    wave *= (begins <= _TIME) & (begins + lasts > _TIME)
    return wave + chance.uniform(0.05, 0.5) * chance.standard_normal(len(_TIME))


def spectrum(waves: np.ndarray) -> np.ndarray:
    """Compute the input of the encoder: the logarithm of the power of each frequency in each frame.

    Args:
        waves: float [n, FRAMES * FRAME].

    Returns:
        float32 [n, FRAMES, BINS], about zero mean and unit variance.
    """
    frames = waves.reshape(len(waves), FRAMES, FRAME) * _WINDOW
    power = np.abs(np.fft.rfft(frames)[..., _BAND]) ** 2
    return ((np.log10(power + 1e-3) - 0.8) / 1.0).astype(np.float32)


def picture(features: np.ndarray) -> np.ndarray:
    """Draw spectra as small images with high frequencies at the top.

    Args:
        features: float32 [n, FRAMES, BINS].

    Returns:
        float32 [n, 8, FRAMES] with values 0..16.
    """
    loudest = features.reshape(len(features), FRAMES, 8, BINS // 8).max(axis=-1)
    return np.clip((loudest.transpose(0, 2, 1)[:, ::-1] - 0.5) * 8, 0, 16).astype(np.float32)
