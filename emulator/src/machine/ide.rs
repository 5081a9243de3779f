//! The board's IDE: the PIIX3 south bridge and its two channels at the places where every PC has them (Intel 82371SB data sheet, 290550).

use crate::devices::disk::Disk;
use crate::devices::ide::{Channel, Kind};
use crate::devices::pci::{ConfigSpace, Identity, reg};
use crate::mem::GuestMemory;
use std::sync::{Arc, Mutex};

/// Device and function on PCI: the bridge to ISA, and the controller.
pub const BRIDGE: u8 = 1 << 3;
pub const CONTROLLER: u8 = 1 << 3 | 1;
/// Interrupt lines of the channels.
pub const IRQS: [u8; 2] = [14, 15];
/// Ports of the bus masters when no firmware chooses others.
const MASTER: u16 = 0xc000;

/// A drive: what it is, and what is in it.
pub type IdeDrive = (Kind, Arc<Mutex<Disk>>);

/// What a port is.
enum Place {
    /// Register 0 (data) to 7 of a channel.
    Register(usize, u8),
    /// Alternate status and device control.
    Control(usize),
    /// A bus master's register 0 to 7.
    Master(usize, u8),
}

/// Bridge, controller and channels.
pub struct Ide {
    channels: [Channel; 2],
    bridge: ConfigSpace,
    controller: ConfigSpace,
    mem: Arc<GuestMemory>,
}

impl Ide {
    /// With drives as first and second of the first channel, then of the second.
    pub fn new(drives: &[Option<IdeDrive>; 4], mem: Arc<GuestMemory>) -> Ide {
        let who = |device, class| Identity { vendor: 0x8086, device, revision: 0, class, subsystem: (0x1af4, 0x1100) };
        let mut bridge = ConfigSpace::new(who(0x7000, 0x06_0100));
        // One of several functions. Interrupt routes can be written and change nothing: the board's are fixed.
        bridge.put(0xe, &[0x80]);
        bridge.put(reg::COMMAND, &[7, 0]);
        bridge.allow(0x4c, &[0xff; 4]);
        bridge.allow(0x60, &[0x8f; 4]);
        let mut controller = ConfigSpace::new(who(0x7010, 0x01_0180));
        controller.io_bar(4, 16);
        // Both channels decode their ports, whatever is written; the rest of their timing registers is kept.
        controller.put(0x40, &[0, 0x80, 0, 0x80]);
        controller.allow(0x40, &[0xff, 0x7f, 0xff, 0x7f, 0xff]);
        let mut channels = <[Channel; 2]>::default();
        for (n, drive) in drives.iter().enumerate() {
            if let Some((kind, disk)) = drive {
                channels[n / 2].attach(n % 2 == 1, *kind, disk.clone());
            }
        }
        Ide { channels, bridge, controller, mem }
    }

    /// As firmware leaves it: the bus masters' ports are given and on.
    pub fn place(&mut self) {
        self.controller.put(reg::BARS + 16, &(MASTER | 1).to_le_bytes());
        self.controller.put(reg::COMMAND, &[5, 0]);
    }

    /// The configuration space of one of its functions.
    pub fn config(&mut self, function: u8) -> Option<&mut ConfigSpace> {
        match function {
            BRIDGE => Some(&mut self.bridge),
            CONTROLLER => Some(&mut self.controller),
            _ => None,
        }
    }

    fn find(&self, port: u16) -> Option<Place> {
        match port {
            0x1f0..=0x1f7 => Some(Place::Register(0, port as u8 & 7)),
            0x170..=0x177 => Some(Place::Register(1, port as u8 & 7)),
            0x3f6 => Some(Place::Control(0)),
            0x376 => Some(Place::Control(1)),
            _ => {
                let n = self.controller.io_base(4).and_then(|base| port.checked_sub(base)).filter(|n| *n < 16)?;
                Some(Place::Master(usize::from(n / 8), n as u8 & 7))
            }
        }
    }

    /// Is it one of its ports?
    pub fn answers(&self, port: u16) -> bool {
        self.find(port).is_some()
    }

    /// Reads a byte; one of the data port takes its word's other byte with it.
    pub fn read(&mut self, port: u16) -> u8 {
        match self.find(port) {
            Some(Place::Register(n, 0)) => {
                let mut word = [0; 2];
                self.channels[n].read_data(&mut word);
                word[0]
            }
            Some(Place::Register(n, register)) => self.channels[n].read(register),
            Some(Place::Control(n)) => self.channels[n].alternate_status(),
            Some(Place::Master(n, register)) => self.channels[n].master.read(register),
            None => 0xff,
        }
    }

    /// Writes a byte.
    pub fn write(&mut self, port: u16, v: u8) {
        let n = match self.find(port) {
            Some(Place::Register(n, 0)) => {
                self.channels[n].write_data(&[v, 0]);
                n
            }
            Some(Place::Register(n, register)) => {
                self.channels[n].write(register, v);
                n
            }
            Some(Place::Control(n)) => {
                self.channels[n].write_control(v);
                n
            }
            Some(Place::Master(n, register)) => {
                self.channels[n].master.write(register, v);
                n
            }
            None => return,
        };
        self.channels[n].run_master(&self.mem);
    }

    /// Reads 16 or 32 bits of the data port; false: not a data port.
    pub fn read_data(&mut self, port: u16, data: &mut [u8]) -> bool {
        match self.find(port) {
            Some(Place::Register(n, 0)) if data.len() > 1 => {
                self.channels[n].read_data(data);
                true
            }
            _ => false,
        }
    }

    /// Writes 16 or 32 bits of the data port; false: not a data port.
    pub fn write_data(&mut self, port: u16, data: &[u8]) -> bool {
        match self.find(port) {
            Some(Place::Register(n, 0)) if data.len() > 1 => {
                self.channels[n].write_data(data);
                // The last bytes of a packet may be those of a command that the bus master serves.
                self.channels[n].run_master(&self.mem);
                true
            }
            _ => false,
        }
    }

    /// The channels' interrupt pins.
    pub fn irqs(&self) -> [bool; 2] {
        [self.channels[0].irq(), self.channels[1].irq()]
    }
}
