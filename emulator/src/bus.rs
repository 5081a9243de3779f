//! The traits between an engine and the chips: ports, memory-mapped I/O, interrupts.

/// Nanoseconds of virtual time.
pub type Ns = u64;

/// The machine as an engine sees it. I/O is a call; everything else that somebody must decide leaves the engine as
/// [`crate::vcpu::Exit`]. Locks, where needed, are inside.
pub trait Bus: Sync {
    /// IN: fills `data` (1, 2 or 4 bytes).
    fn read_port(&self, port: u16, data: &mut [u8]);
    /// OUT.
    fn write_port(&self, port: u16, data: &[u8]);
    /// A load from a guest-physical address without RAM.
    fn read_mmio(&self, gpa: u64, data: &mut [u8]);
    /// A store to a guest-physical address without RAM.
    fn write_mmio(&self, gpa: u64, data: &[u8]);
    /// Is an interrupt waiting? Asked at instruction boundaries while interrupts are enabled.
    fn interrupt_pending(&self) -> bool {
        false
    }
    /// INTA: the vector, acknowledged.
    fn take_interrupt(&self) -> Option<u8>;
}

/// A bus with nothing on it: reads give all ones, writes are lost. What a Linux process has.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmptyBus;

impl Bus for EmptyBus {
    fn read_port(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_port(&self, _port: u16, _data: &[u8]) {}
    fn read_mmio(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_mmio(&self, _gpa: u64, _data: &[u8]) {}
    fn take_interrupt(&self) -> Option<u8> {
        None
    }
}
