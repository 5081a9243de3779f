//! The user's terminal as the machine's console: raw mode, restored whatever happens, and a menu behind Ctrl-A.

use crate::keyboard;
use bivisor_emulator::machine::{End, Remote, Screen};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Ctrl-A.
const ESCAPE: u8 = 1;

const HELP: &str = "\r\nCtrl-A h  this help\r\nCtrl-A x  quit\r\nCtrl-A p  press the power button\r\nCtrl-A t  show the text screen\r\n\
    Ctrl-A k  type on the keyboard, or on the serial line again\r\nCtrl-A a  send Ctrl-A\r\n";

/// Where what is typed goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The first serial port.
    Serial,
    /// The PC's keyboard.
    Keyboard,
    /// The virtio console.
    Console,
}

/// The terminal while a machine has it.
pub struct Terminal {
    before: Option<Termios>,
    machine: Arc<Attached>,
}

/// The machine that what is typed goes to.
#[derive(Default)]
pub struct Attached {
    machine: Mutex<Option<Remote>>,
    changed: Condvar,
}

impl Attached {
    /// The machine; while there is none, what is typed waits.
    pub fn wait(&self) -> Remote {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*machine {
                Some(machine) => return machine.clone(),
                None => machine = self.changed.wait(machine).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// From now on this one, or none.
    pub fn set(&self, machine: Option<Remote>) {
        *self.machine.lock().unwrap_or_else(PoisonError::into_inner) = machine;
        self.changed.notify_all();
    }
}

impl Terminal {
    /// Takes standard input: raw if it is a terminal, else as it is.
    pub fn take(input: Input) -> Terminal {
        let stdin = std::io::stdin();
        let before = isatty(&stdin).then(|| tcgetattr(&stdin).ok()).flatten();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            let _ = tcsetattr(&stdin, OptionalActions::Now, &raw);
            // A panic, in whatever thread, is reported on a terminal that is as before.
            let (before, report) = (before.clone(), std::panic::take_hook());
            std::panic::set_hook(Box::new(move |panic| {
                restore(&before);
                report(panic);
            }));
        }
        let machine = Arc::<Attached>::default();
        let (with_menu, to) = (before.is_some(), machine.clone());
        // Reading cannot be interrupted: the thread ends with the program or its input.
        std::thread::spawn(move || pump(&to, input, with_menu));
        Terminal { before, machine }
    }

    /// From now on what is typed goes to this machine.
    pub fn attach(&self, machine: Remote) {
        // It may have changed while there was no machine.
        tell_size(&machine);
        self.machine.set(Some(machine));
    }

    /// What is typed waits for the next machine.
    pub fn detach(&self) {
        self.machine.set(None);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            restore(before);
        }
    }
}

fn restore(before: &Termios) {
    let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
}

fn send(machine: &Remote, input: Input, typed: &[u8]) {
    match input {
        Input::Serial => machine.type_serial(typed),
        Input::Console => machine.type_console(typed),
        Input::Keyboard => machine.press_keys(&keyboard::scan_codes(typed)),
    }
}

/// Tells the machine's virtio console the size of the terminal, if that has one.
pub fn tell_size(machine: &Remote) {
    if let Some((columns, rows)) = size() {
        machine.resize_console(columns, rows);
    }
}

/// Columns and rows of the terminal on standard input.
pub fn size() -> Option<(u16, u16)> {
    tcgetwinsize(std::io::stdin()).ok().map(|s| (s.ws_col, s.ws_row))
}

fn say(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The text screen as lines for a terminal in raw mode.
fn screen(machine: &Remote) -> String {
    let Some(screen) = machine.screen() else { return "\r\n(the screen shows no text)\r\n".into() };
    let mut rows: Vec<String> = screen.rows().map(Screen::text).collect();
    rows.truncate(rows.iter().rposition(|r| !r.is_empty()).map_or(0, |last| last + 1));
    format!("\r\n{}\r\n", rows.join("\r\n"))
}

fn pump(to: &Attached, mut input: Input, with_menu: bool) {
    let mut stdin = std::io::stdin().lock();
    let mut buffer = [0; 256];
    let mut escaped = false;
    while let Ok(n @ 1..) = stdin.read(&mut buffer) {
        let machine = to.wait();
        if !with_menu {
            send(&machine, input, &buffer[..n]);
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
                (true, b't') => say(&screen(&machine)),
                (true, b'k') => {
                    send(&machine, input, &std::mem::take(&mut typed));
                    input = if input == Input::Serial { Input::Keyboard } else { Input::Serial };
                }
                (true, b'h' | b'?') => say(HELP),
                (true, _) => {}
            }
        }
        send(&machine, input, &typed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use std::fs::File;
    use std::process::{Command, Stdio};

    /// Says to this test, started again on a terminal of its own, that it is the one to panic.
    const PANICS: &str = "BIVISOR_TEST_PANICS";

    /// A panic of ours is told on a terminal that is as before: its message is not torn by raw mode, and the shell has its terminal back.
    /// In another thread, and with the program ended at once, nothing but the hook can do that.
    #[test]
    fn a_panic_is_told_on_a_terminal_as_before() {
        if std::env::var_os(PANICS).is_some() {
            let terminal = Terminal::take(Input::Serial);
            let raw = tcgetattr(std::io::stdin()).expect("a terminal");
            assert_ne!(raw.local_modes, terminal.before.as_ref().expect("a terminal").local_modes, "it is raw");
            let _ = std::thread::spawn(|| panic!("as a test wants it")).join();
            std::process::exit(77);
        }
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudoterminal");
        grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("unlocked");
        let name = ptsname(&ours, Vec::new()).expect("a name").into_string().expect("plain");
        let theirs = File::options().read(true).write(true).open(name).expect("opens");
        let before = tcgetattr(&theirs).expect("a terminal");
        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.args(["--exact", "--nocapture", "terminal::tests::a_panic_is_told_on_a_terminal_as_before"]);
        child.env(PANICS, "1").stdin(theirs.try_clone().expect("cloned")).stdout(Stdio::null()).stderr(Stdio::piped());
        let output = child.output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(77), "{said}");
        assert!(said.contains("as a test wants it"), "{said}");
        let after = tcgetattr(&theirs).expect("a terminal");
        assert_eq!(
            (after.local_modes, after.input_modes, after.output_modes),
            (before.local_modes, before.input_modes, before.output_modes)
        );
    }
}
