//! The traits between an engine and the chips: ports, memory-mapped I/O, interrupts.

use std::sync::Arc;

/// Nanoseconds of virtual time.
pub type Ns = u64;

/// Interrupt controllers that an engine has itself, in the place of the board's: the pair of 8259s, the I/O APIC, the local APIC.
pub trait Controllers: Send + Sync {
    /// The level of an interrupt line, by ISA number; 16 to 23 are on the I/O APIC only.
    fn set_line(&self, irq: u8, level: bool);
    /// A message-signalled interrupt (SDM 3A 11.11).
    fn message(&self, address: u64, data: u32);
}

/// How an 8259 has been programmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Programmed {
    /// The vector of its first input.
    pub base: u8,
    /// Masked inputs.
    pub masked: u8,
    /// Level-triggered inputs.
    pub by_level: u8,
}

/// The machine as an engine sees it. I/O is a call; everything else that somebody must decide leaves the engine as
/// [`crate::vcpu::Exit`]. Locks, where needed, are inside. Where nothing is connected reads give all ones, writes are lost, and nothing
/// interrupts.
pub trait Bus: Sync {
    /// IN: fills `data` (1, 2 or 4 bytes).
    fn read_port(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    /// OUT.
    fn write_port(&self, _port: u16, _data: &[u8]) {}
    /// A load from a guest-physical address without RAM.
    fn read_mmio(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    /// A store to a guest-physical address without RAM.
    fn write_mmio(&self, _gpa: u64, _data: &[u8]) {}
    /// Is an interrupt waiting? Asked at instruction boundaries while interrupts are enabled.
    fn interrupt_pending(&self) -> bool {
        false
    }
    /// INTA: the vector, acknowledged.
    fn take_interrupt(&self) -> Option<u8> {
        None
    }
    /// Is a non-maskable interrupt waiting? Asked where interrupts are, whatever RFLAGS.IF is.
    fn nmi_pending(&self) -> bool {
        false
    }
    /// Takes the non-maskable interrupt; false if there is none any more.
    fn take_nmi(&self) -> bool {
        false
    }
    /// RDMSR of a register that is the local APIC's: IA32_TSC_DEADLINE (0x6E0, in ticks of the counter without the guest's offset) and, in x2APIC mode, 0x800
    /// to 0x8FF. `None` is #GP(0): no such register.
    fn read_msr(&self, _index: u32) -> Option<u64> {
        None
    }
    /// WRMSR of a register that [`Bus::read_msr`] reads; `None` is #GP(0). IA32_APIC_BASE (0x1B), which the CPU keeps itself, is told
    /// here too after the CPU has checked it; what is answered to that is ignored.
    fn write_msr(&self, _index: u32, _value: u64) -> Option<()> {
        None
    }
    /// The local APIC's task-priority class (bits 7:4 of its TPR), which is CR8; `None` without a local APIC.
    fn task_priority(&self) -> Option<u8> {
        None
    }
    /// From now on interrupts go to these controllers, and the board's own are not used. Gives how firmware has left its 8259s, the master
    /// first; `None`: there are none.
    fn use_controllers(&self, _controllers: Arc<dyn Controllers>) -> Option<[Programmed; 2]> {
        None
    }
    /// Has one of the board's controllers been accessed, although an engine has its own, since the last time this was asked?
    fn has_strayed(&self) -> bool {
        false
    }
    /// The time-stamp counter before the guest's offset, where the machine's time is not the host's.
    fn time_stamp(&self) -> Option<u64> {
        None
    }
    /// MOV to CR8: 0 to 15.
    fn set_task_priority(&self, _class: u8) {}
    /// FERR#, told at x87 instructions while CR0.NE is clear: does an x87 exception wait? Gives IGNNE#, by which the exception is ignored; `None`
    /// where these pins are not connected (SDM 1 D.2: errors are then told as with NE set).
    fn x87_error(&self, _waits: bool) -> Option<bool> {
        None
    }
}

/// A bus with nothing on it: reads give all ones, writes are lost. What a Linux process has.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmptyBus;

impl Bus for EmptyBus {}
