//! 8042 keyboard controller with a PS/2 keyboard on it (IBM PS/2 hardware interface reference, keyboard controller).

use std::collections::VecDeque;

/// Configuration byte: keyboard interrupt, system flag, keyboard disabled, translation.
const CONFIG_INTERRUPT: u8 = 1;
const CONFIG_SYSTEM: u8 = 4;
const CONFIG_DISABLED: u8 = 0x10;
const CONFIG_TRANSLATE: u8 = 0x40;

const ACK: u8 = 0xfa;
const QUEUE: usize = 32;

/// The controller and its keyboard. There is no mouse.
#[derive(Clone, Debug)]
pub struct I8042 {
    config: u8,
    /// A20 gate and the line that is not reset.
    output_port: u8,
    /// From the controller itself.
    answers: VecDeque<u8>,
    /// From the keyboard.
    keys: VecDeque<u8>,
    /// The controller command that waits for its byte.
    command: Option<u8>,
    /// The keyboard command that waits for its byte.
    keyboard_command: Option<u8>,
    last_was_command: bool,
    scanning: bool,
    reset: bool,
}

impl Default for I8042 {
    fn default() -> I8042 {
        I8042 {
            config: CONFIG_INTERRUPT | CONFIG_SYSTEM | CONFIG_TRANSLATE,
            output_port: 3,
            answers: VecDeque::new(),
            keys: VecDeque::new(),
            command: None,
            keyboard_command: None,
            last_was_command: false,
            scanning: true,
            reset: false,
        }
    }
}

impl I8042 {
    /// Scan codes (set 1) of a key; dropped if the queue is full.
    pub fn press(&mut self, codes: &[u8]) {
        if self.scanning && self.keys.len() + codes.len() <= QUEUE {
            self.keys.extend(codes);
        }
    }

    /// How many scan codes the queue still takes.
    pub fn room(&self) -> usize {
        QUEUE.saturating_sub(self.keys.len())
    }

    fn keyboard_byte(&self) -> Option<u8> {
        self.keys.front().copied().filter(|_| self.config & CONFIG_DISABLED == 0)
    }

    /// The keyboard's interrupt pin.
    pub fn irq(&self) -> bool {
        self.config & CONFIG_INTERRUPT != 0 && self.answers.is_empty() && self.keyboard_byte().is_some()
    }

    /// Has the guest pulsed the reset line? Asking clears it.
    pub fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.reset)
    }

    /// Is address line 20 let through?
    pub fn a20(&self) -> bool {
        self.output_port & 2 != 0
    }

    /// Sets address line 20's gate, which port 0x92 has too.
    pub fn set_a20(&mut self, on: bool) {
        self.output_port = self.output_port & !2 | u8::from(on) << 1;
    }

    /// The status register (port 0x64).
    pub fn status(&self) -> u8 {
        let full = !self.answers.is_empty() || self.keyboard_byte().is_some();
        u8::from(full) | self.config & CONFIG_SYSTEM | u8::from(self.last_was_command) << 3 | 0x10
    }

    /// The data register (port 0x60).
    pub fn data(&mut self) -> u8 {
        if let Some(v) = self.answers.pop_front() {
            return v;
        }
        match self.keyboard_byte() {
            Some(v) => {
                self.keys.pop_front();
                v
            }
            None => 0,
        }
    }

    fn answer(&mut self, v: u8) {
        if self.answers.len() < QUEUE {
            self.answers.push_back(v);
        }
    }

    /// Writes the command register (port 0x64).
    pub fn write_command(&mut self, v: u8) {
        self.last_was_command = true;
        self.command = None;
        match v {
            0x20 => self.answer(self.config),
            0x60 | 0xd1..=0xd4 => self.command = Some(v),
            // Self-test passed; the keyboard's lines are good.
            0xaa => {
                self.config |= CONFIG_SYSTEM;
                self.answer(0x55);
            }
            0xab => self.answer(0),
            0xad => self.config |= CONFIG_DISABLED,
            0xae => self.config &= !CONFIG_DISABLED,
            // The mouse's lines: no clock, for there is none.
            0xa9 => self.answer(1),
            0xc0 => self.answer(0x80),
            0xd0 => self.answer(self.output_port),
            // Pulses of output lines; line 0 is reset.
            0xf0..=0xff if v & 1 == 0 => self.reset = true,
            _ => {}
        }
    }

    /// Writes the data register (port 0x60).
    pub fn write_data(&mut self, v: u8) {
        self.last_was_command = false;
        match self.command.take() {
            Some(0x60) => self.config = v,
            Some(0xd1) => {
                self.output_port = v | 1;
                self.reset |= v & 1 == 0;
            }
            Some(0xd2) => self.answer(v),
            Some(_) => {}
            None => self.keyboard(v),
        }
    }

    /// A byte for the keyboard.
    fn keyboard(&mut self, v: u8) {
        self.config &= !CONFIG_DISABLED;
        if let Some(command) = self.keyboard_command.take() {
            // LEDs, scan code set (0 asks for it), typematic rate.
            self.keys.push_back(ACK);
            if (command, v) == (0xf0, 0) {
                self.keys.push_back(if self.config & CONFIG_TRANSLATE != 0 { 0x41 } else { 2 });
            }
            return;
        }
        match v {
            0xff => {
                self.keys.clear();
                self.scanning = true;
                self.keys.extend([ACK, 0xaa]);
            }
            0xf2 => self.keys.extend([ACK, 0xab, if self.config & CONFIG_TRANSLATE != 0 { 0x41 } else { 0x83 }]),
            0xee => self.keys.push_back(0xee),
            0xed | 0xf0 | 0xf3 => {
                self.keyboard_command = Some(v);
                self.keys.push_back(ACK);
            }
            0xf4..=0xf6 => {
                self.scanning = v != 0xf5;
                self.keys.push_back(ACK);
            }
            _ => self.keys.push_back(0xfe),
        }
        self.keys.truncate(QUEUE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn self_test_and_configuration() {
        let mut k = I8042::default();
        k.write_command(0xaa);
        assert_eq!((k.status() & 1, k.data(), k.status() & 1), (1, 0x55, 0));
        k.write_command(0x60);
        k.write_data(0x61);
        k.write_command(0x20);
        assert_eq!(k.data(), 0x61);
    }

    #[test]
    fn the_keyboard_answers_and_sends_keys() {
        let mut k = I8042::default();
        k.write_data(0xff);
        assert!(k.irq());
        assert_eq!((k.data(), k.data()), (ACK, 0xaa));
        k.press(&[0x1e, 0x9e]);
        assert_eq!((k.irq(), k.data(), k.data(), k.irq()), (true, 0x1e, 0x9e, false));
        k.write_command(0xad);
        k.press(&[0x1e]);
        assert_eq!(k.status() & 1, 0, "disabled");
    }

    #[test]
    fn reset_and_a20() {
        let mut k = I8042::default();
        k.write_command(0xfe);
        assert!(k.take_reset() && !k.take_reset());
        k.write_command(0xd1);
        k.write_data(0xdd);
        assert!(!k.a20());
        k.write_command(0xd1);
        k.write_data(0xdf);
        assert!(k.a20() && !k.take_reset());
    }
}
