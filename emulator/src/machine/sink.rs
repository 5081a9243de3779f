//! Where a device's bytes go: buffered until a line ends, so that a guest's console costs a system call a line.

use std::io::Write;

const MOST: usize = 4096;

/// A buffered way out.
pub struct Sink {
    to: Box<dyn Write + Send>,
    waiting: Vec<u8>,
}

impl Sink {
    /// To a file, a terminal, or anywhere.
    pub fn new(to: Box<dyn Write + Send>) -> Sink {
        Sink { to, waiting: Vec::new() }
    }

    /// To nowhere.
    pub fn none() -> Sink {
        Sink::new(Box::new(std::io::sink()))
    }

    /// Takes bytes. Whoever reads them may have gone: the guest does not notice.
    pub fn write(&mut self, bytes: &[u8]) {
        self.waiting.extend(bytes);
        if bytes.contains(&b'\n') || self.waiting.len() >= MOST {
            self.flush();
        }
    }

    /// Passes on what is waiting.
    pub fn flush(&mut self) {
        if !self.waiting.is_empty() {
            let _ = self.to.write_all(&self.waiting).and_then(|()| self.to.flush());
            self.waiting.clear();
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Sink::write(self, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Sink::flush(self);
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.flush();
    }
}
