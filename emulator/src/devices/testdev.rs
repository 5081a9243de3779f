//! The test device of QEMU's PCs (pc-testdev): scratch ports, interrupt lines to raise at will, a page of memory-mapped bytes.

/// Ports 0xE0 to 0xE4, 0x2000 and following, memory at 0xFF000000.
#[derive(Clone, Debug)]
pub struct TestDevice {
    scratch: [u8; 4],
    lines: u32,
    memory: Vec<u8>,
}

const SCRATCH: u16 = 0xe0;
const FLUSH: u16 = 0xe4;
const LINES: u16 = 0x2000;
const COUNT: u16 = 24;
const MEMORY: u64 = 0xff00_0000;
const SIZE: usize = 0x1_0000;

impl Default for TestDevice {
    fn default() -> TestDevice {
        TestDevice { scratch: [0; 4], lines: 0, memory: vec![0; SIZE] }
    }
}

impl TestDevice {
    /// The levels of its interrupt lines, a bit each.
    pub fn lines(&self) -> u32 {
        self.lines
    }

    /// Reads a port. False: it is none of ours.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        match port {
            SCRATCH..FLUSH => {
                for (i, b) in data.iter_mut().enumerate() {
                    *b = self.scratch.get(usize::from(port - SCRATCH) + i).copied().unwrap_or(0);
                }
                true
            }
            _ => false,
        }
    }

    /// Writes a port. False: it is none of ours.
    pub fn write_port(&mut self, port: u16, data: &[u8]) -> bool {
        match port {
            SCRATCH..FLUSH => {
                for (i, b) in data.iter().enumerate() {
                    if let Some(to) = self.scratch.get_mut(usize::from(port - SCRATCH) + i) {
                        *to = *b;
                    }
                }
            }
            // Asks the host to drop a page from its own tables: nothing the guest could see.
            FLUSH => {}
            _ if (LINES..LINES + COUNT).contains(&port) => {
                let bit = 1 << (port - LINES);
                self.lines = if data.iter().any(|b| *b != 0) { self.lines | bit } else { self.lines & !bit };
            }
            _ => return false,
        }
        true
    }

    fn place(gpa: u64, len: usize) -> Option<usize> {
        let at = gpa.checked_sub(MEMORY).filter(|at| *at < SIZE as u64)? as usize;
        (at + len <= SIZE).then_some(at)
    }

    /// Reads memory. False: it is none of ours.
    pub fn read_memory(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some(at) = TestDevice::place(gpa, data.len()) else { return false };
        data.copy_from_slice(&self.memory[at..at + data.len()]);
        true
    }

    /// Writes memory. False: it is none of ours.
    pub fn write_memory(&mut self, gpa: u64, data: &[u8]) -> bool {
        let Some(at) = TestDevice::place(gpa, data.len()) else { return false };
        self.memory[at..at + data.len()].copy_from_slice(data);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_lines_and_memory() {
        let mut t = TestDevice::default();
        assert!(t.write_port(0xe0, &[1, 2, 3, 4]) && t.write_port(0xe2, &[9]));
        let mut word = [0; 4];
        assert!(t.read_port(0xe0, &mut word));
        assert_eq!(word, [1, 2, 9, 4]);
        assert!(t.write_port(0x2005, &[1, 0, 0, 0]) && t.write_port(0x2009, &[1]) && t.write_port(0x2005, &[0]));
        assert_eq!(t.lines(), 1 << 9);
        assert!(t.write_memory(0xff00_fff8, &[5; 8]) && !t.write_memory(0xff00_fff9, &[5; 8]));
        assert!(!t.write_port(0x2018, &[1]) && !t.read_port(0xe5, &mut word));
    }
}
