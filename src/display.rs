//! The machine's text screen on standard output: drawn in place on a terminal, else row by row as rows change.

use crate::terminal;
use bivisor_emulator::machine::{Remote, Screen};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two looks at the screen.
const PAUSE: Duration = Duration::from_millis(40);

/// The VGA's colours in the terminal's order.
const COLOURS: [u8; 8] = [0, 4, 2, 6, 1, 5, 3, 7];

/// Shows a machine's screen until it is dropped.
pub struct Display {
    off: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Shows what is on it from now on.
    pub fn start(machine: Remote) -> Display {
        let off = Arc::new(AtomicBool::new(false));
        let stop = off.clone();
        let thread = std::thread::spawn(move || show(&machine, &stop));
        Display { off, thread: Some(thread) }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.off.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn show(machine: &Remote, off: &AtomicBool) {
    let mut out = std::io::stdout();
    let drawn = out.is_terminal();
    let mut before: Option<Screen> = None;
    let mut size = terminal::size();
    loop {
        // Another size: what is on the terminal is no longer what was drawn.
        let resized = terminal::size();
        if drawn && std::mem::replace(&mut size, resized) != resized {
            before = None;
        }
        // One more look after the end.
        let last = off.load(Ordering::Relaxed);
        let now = machine.screen();
        if let Some(screen) = now.filter(|s| before.as_ref() != Some(s)) {
            let text = if drawn { draw(before.as_ref(), &screen) } else { print(before.as_ref(), &screen) };
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            before = Some(screen);
        }
        if last {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    if let Some(screen) = before.filter(|_| drawn) {
        let _ = write!(out, "\x1b[{};1H\x1b[0m\x1b[?25h\r\n", screen.rows().count()).and_then(|()| out.flush());
    }
}

/// The rows that are not as they were, as lines.
fn print(before: Option<&Screen>, now: &Screen) -> String {
    let texts = |s: &Screen| s.rows().map(Screen::text).collect::<Vec<_>>();
    let old = before.map(texts).unwrap_or_default();
    let mut out = String::new();
    // Scrolled by some rows: what is new is at the bottom.
    let new = texts(now);
    let is_scrolled =
        |by: &usize| !old.is_empty() && new[..new.len() - by] == old[*by..] && old[*by..].iter().any(|r| !r.is_empty());
    let scrolled = (1..new.len().min(old.len())).find(is_scrolled).filter(|_| new.len() == old.len());
    for (n, row) in new.iter().enumerate() {
        let same = match scrolled {
            Some(by) => n < new.len() - by,
            None => old.get(n) == Some(row),
        };
        if !same && !row.is_empty() {
            out.push_str(row);
            out.push('\n');
        }
    }
    out
}

/// The cells that are not as they were, for a terminal.
fn draw(before: Option<&Screen>, now: &Screen) -> String {
    let before = before.filter(|b| b.columns == now.columns && b.cells.len() == now.cells.len());
    let mut out = String::from("\x1b[?25l");
    if before.is_none() {
        out.push_str("\x1b[0m\x1b[2J");
    }
    let (mut place, mut colour) = (None, None);
    for (n, (cell, row, column)) in
        now.cells.iter().enumerate().map(|(n, c)| (n, (c, n / now.columns, n % now.columns)))
    {
        if before.is_some_and(|b| b.cells[n] == *cell) {
            continue;
        }
        if place != Some((row, column)) {
            let _ = write!(out, "\x1b[{};{}H", row + 1, column + 1);
        }
        if colour != Some(cell.1) {
            let (front, back) = (cell.1 & 15, cell.1 >> 4);
            let bright =
                |v: u8, plain: u8, bright: u8| COLOURS[usize::from(v & 7)] + if v & 8 != 0 { bright } else { plain };
            let blink = now.blinks && back & 8 != 0;
            let back = if now.blinks { back & 7 } else { back };
            let _ = write!(
                out,
                "\x1b[0;{}{};{}m",
                if blink { "5;" } else { "" },
                bright(front, 30, 90),
                bright(back, 40, 100)
            );
            colour = Some(cell.1);
        }
        out.push(Screen::character(cell.0));
        place = Some((row, column + 1));
    }
    if let Some((row, column)) = now.cursor {
        let _ = write!(out, "\x1b[{};{}H\x1b[?25h", row + 1, column + 1);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(rows: &[&str]) -> Screen {
        let cells = rows.iter().flat_map(|r| format!("{r:4}").into_bytes()).map(|b| (b, 7)).collect();
        Screen { columns: 4, cells, cursor: Some((0, 0)), blinks: true }
    }

    #[test]
    fn rows_are_printed_once() {
        let first = screen(&["one", "two", ""]);
        assert_eq!(print(None, &first), "one\ntwo\n");
        let second = screen(&["one", "2", ""]);
        assert_eq!(print(Some(&first), &second), "2\n");
        let scrolled = screen(&["2", "", "new"]);
        assert_eq!(print(Some(&second), &scrolled), "new\n");
    }

    #[test]
    fn only_changed_cells_are_drawn() {
        let first = screen(&["one", "two"]);
        let all = "\x1b[?25l\x1b[0m\x1b[2J\x1b[1;1H\x1b[0;37;40mone \x1b[2;1Htwo \x1b[1;1H\x1b[?25h";
        assert_eq!(draw(None, &first), all);
        let mut second = screen(&["one", "tWo"]);
        second.cells[5].1 = 0x1e;
        assert_eq!(draw(Some(&first), &second), "\x1b[?25l\x1b[2;2H\x1b[0;93;44mW\x1b[1;1H\x1b[?25h");
    }
}
