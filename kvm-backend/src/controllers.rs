//! KVM's own interrupt controllers (Documentation/virt/kvm/api.rst, KVM_CREATE_IRQCHIP): the pair of 8259s, the I/O APIC and the local APIC
//! of the virtual CPU, in the kernel. A guest's accesses to them, its end of interrupts and its HLT do not come out to the monitor then.

use crate::vm::{Vm, host_error};
use bivisor_emulator::bus::{Controllers, Programmed};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irqchip, kvm_msi,
    kvm_pic_state,
};
use kvm_ioctls::{Cap, VmFd};
use std::io;

/// Inputs of the I/O APIC.
const LINES: u32 = 24;
/// Inputs of each 8259 that the ELCR may make level-triggered (the PIIX's data sheet: not 0, 1, 2, 8, 13).
const MAY_BE_LEVEL: [u8; 2] = [0xf8, 0xde];

/// Those of one virtual machine.
pub struct InKernel {
    vm: VmFd,
}

/// Has this host's KVM any?
pub fn are_there(vm: &Vm) -> bool {
    [Cap::Irqchip, Cap::IrqRouting].into_iter().all(|c| vm.fd().check_extension(c))
}

impl InKernel {
    /// Makes them: before the virtual CPU.
    pub fn new(vm: &mut Vm) -> io::Result<InKernel> {
        vm.fd().create_irq_chip().map_err(host_error)?;
        // As the board's MADT has it: line 0 is input 2 of the I/O APIC, line 2 leads from one 8259 to the other.
        let to = |gsi: u32, irqchip: u32, pin: u32| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
            ..Default::default()
        };
        let entries: Vec<_> = (0..LINES)
            .filter(|irq| *irq != 2)
            .flat_map(|irq| {
                let pic = match irq {
                    0..8 => Some(to(irq, KVM_IRQCHIP_PIC_MASTER, irq)),
                    8..16 => Some(to(irq, KVM_IRQCHIP_PIC_SLAVE, irq - 8)),
                    _ => None,
                };
                let input = if irq == 0 { 2 } else { irq };
                pic.into_iter().chain([to(irq, KVM_IRQCHIP_IOAPIC, input)])
            })
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        vm.fd().set_gsi_routing(&routing).map_err(host_error)?;
        Ok(InKernel { vm: vm.second()? })
    }

    /// Programs the pair as firmware has left another.
    pub fn program(&self, pair: [Programmed; 2]) -> io::Result<()> {
        for (n, p) in pair.into_iter().enumerate() {
            let mut chip =
                kvm_irqchip { chip_id: [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE][n], ..Default::default() };
            chip.chip.pic = kvm_pic_state {
                irq_base: p.base,
                imr: p.masked,
                elcr: p.by_level & MAY_BE_LEVEL[n],
                elcr_mask: MAY_BE_LEVEL[n],
                init4: 1,
                ..Default::default()
            };
            self.vm.set_irqchip(&chip).map_err(host_error)?;
        }
        Ok(())
    }
}

impl Controllers for InKernel {
    fn set_line(&self, irq: u8, level: bool) {
        // It fails for lines that are not routed only, as a pin without a wire.
        let _ = self.vm.set_irq_line(irq.into(), level);
    }

    fn message(&self, address: u64, data: u32) {
        let msi =
            kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..Default::default() };
        // One that nobody takes is lost, as on the bus.
        let _ = self.vm.signal_msi(msi);
    }
}
