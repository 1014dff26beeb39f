"""The digits demo with sound: handwritten digits and keypad tones, each with an encoder of its own."""
