//! The board of small ring-0 guests, those of `guests/` and those that the command line assembles: RAM and a few ports.
//!
//! | port | what |
//! | --- | --- |
//! | [`OUTPUT`] | a character of the report |
//! | [`RAISE`] | raises the external interrupt whose vector is written |
//! | [`EXIT`] | the end, with a status |
//! | [`REPORT`] + n | the n-th number of the report |

use bivisor_emulator::bus::Bus;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// A character of the report.
pub const OUTPUT: u16 = 0xe9;
/// Raises an interrupt.
pub const RAISE: u16 = 0xe8;
/// The end.
pub const EXIT: u16 = 0xf4;
/// OUT of a value to this + n is the n-th of the report.
pub const REPORT: u16 = 0x500;

/// The chips.
#[derive(Default)]
pub struct Ports {
    output: Mutex<Vec<u8>>,
    report: Mutex<BTreeMap<u16, u32>>,
    raised: Mutex<VecDeque<u8>>,
    /// How many those are: engines ask all the time.
    waiting: AtomicUsize,
    status: Mutex<Option<u8>>,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ports {
    /// As they are when the power comes on.
    pub fn reset(&self) {
        lock(&self.output).clear();
        lock(&self.report).clear();
        lock(&self.raised).clear();
        self.waiting.store(0, Ordering::Relaxed);
        *lock(&self.status) = None;
    }

    /// The characters written so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&lock(&self.output)).into_owned()
    }

    /// The numbers reported so far.
    pub fn report(&self) -> BTreeMap<u16, u32> {
        lock(&self.report).clone()
    }

    /// The status, once the guest has ended.
    pub fn status(&self) -> Option<u8> {
        *lock(&self.status)
    }
}

impl Bus for Ports {
    fn read_port(&self, _port: u16, data: &mut [u8]) {
        match data {
            // Without a call: this is the device that answers at once.
            [byte] => *byte = 0xff,
            data => data.fill(0xff),
        }
    }

    fn write_port(&self, port: u16, data: &[u8]) {
        let mut value = [0; 4];
        let n = data.len().min(4);
        value[..n].copy_from_slice(&data[..n]);
        match port {
            OUTPUT => lock(&self.output).push(value[0]),
            RAISE => {
                let mut raised = lock(&self.raised);
                raised.push_back(value[0]);
                self.waiting.store(raised.len(), Ordering::Relaxed);
            }
            EXIT => *lock(&self.status) = Some(value[0]),
            REPORT.. => {
                lock(&self.report).insert(port - REPORT, u32::from_le_bytes(value));
            }
            _ => {}
        }
    }

    fn read_mmio(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_mmio(&self, _gpa: u64, _data: &[u8]) {}

    fn interrupt_pending(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) != 0
    }

    fn take_interrupt(&self) -> Option<u8> {
        let mut raised = lock(&self.raised);
        let vector = raised.pop_front();
        self.waiting.store(raised.len(), Ordering::Relaxed);
        vector
    }
}
