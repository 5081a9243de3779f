//! The user's terminal as the machine's serial console: raw mode, restored whatever happens, and a menu behind Ctrl-A.

use bivisor_emulator::machine::{End, Remote};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Ctrl-A.
const ESCAPE: u8 = 1;

const HELP: &str =
    "\r\nCtrl-A h  this help\r\nCtrl-A x  quit\r\nCtrl-A p  press the power button\r\nCtrl-A a  send Ctrl-A\r\n";

/// The terminal while a machine has it.
pub struct Terminal {
    before: Option<Termios>,
    machine: Arc<Mutex<Option<Remote>>>,
}

impl Terminal {
    /// Takes standard input: raw if it is a terminal, else as it is.
    pub fn take() -> Terminal {
        let stdin = std::io::stdin();
        let before = isatty(&stdin).then(|| tcgetattr(&stdin).ok()).flatten();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            let _ = tcsetattr(&stdin, OptionalActions::Now, &raw);
        }
        let machine = Arc::new(Mutex::new(None::<Remote>));
        let (with_menu, to) = (before.is_some(), machine.clone());
        // Reading cannot be interrupted: the thread ends with the program or its input.
        std::thread::spawn(move || pump(&to, with_menu));
        Terminal { before, machine }
    }

    /// From now on what is typed goes to this machine.
    pub fn attach(&self, machine: Remote) {
        *self.machine.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine);
    }

    /// What is typed goes nowhere.
    pub fn detach(&self) {
        *self.machine.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

fn pump(to: &Mutex<Option<Remote>>, with_menu: bool) {
    let mut stdin = std::io::stdin().lock();
    let mut buffer = [0; 256];
    let mut escaped = false;
    while let Ok(n @ 1..) = stdin.read(&mut buffer) {
        let machine = to.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(machine) = machine else { continue };
        if !with_menu {
            machine.type_serial(&buffer[..n]);
            continue;
        }
        let mut typed = Vec::new();
        for &byte in &buffer[..n] {
            match (std::mem::take(&mut escaped), byte) {
                (false, ESCAPE) => escaped = true,
                (false, byte) => typed.push(byte),
                (true, b'x') => machine.end(End::Quit),
                (true, b'p') => machine.press_power_button(),
                (true, b'a' | ESCAPE) => typed.push(ESCAPE),
                (true, b'h' | b'?') => {
                    let mut out = std::io::stdout();
                    let _ = out.write_all(HELP.as_bytes()).and_then(|()| out.flush());
                }
                (true, _) => {}
            }
        }
        machine.type_serial(&typed);
    }
}
