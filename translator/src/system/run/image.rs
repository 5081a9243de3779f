//! The XSAVE image of the state: what x87 instructions in the cache left there names the guest's code and data (SDM 1 8.1.8).

use super::System;
use crate::run::Translator;
use crate::system::area::at;
use crate::system::enter;
use bivisor_emulator::cpu::xsave::component;

/// The exception summary of the x87 status word.
const SUMMARY: u16 = 1 << 7;

impl System {
    /// Brings the XSAVE image of the state up to date.
    pub(super) fn sync(&mut self, t: &mut Translator) {
        enter::sync(&self.area, &mut t.cpu);
        // FIP, where the host keeps it, names the last x87 instruction in the cache: the guest's is meant (SDM 1 8.1.8).
        let data = self.area.get(at::X87_DATA);
        self.area.set(at::X87_DATA, u64::MAX);
        let image = &mut t.cpu.xsave;
        if image.xstate_bv() & component::X87 == 0 {
            return;
        }
        if let Some((block, point)) = self.cache.point(image.fip()) {
            let fop = point.fop;
            image.set_fip(block.rip.wrapping_add(point.at.into()));
            // The processor may keep it for exceptions only.
            if fop != 0 && (image.fop() != 0 || image.fsw() & SUMMARY != 0) {
                image.set_fop(fop);
            }
        }
        if data != u64::MAX && image.fdp() >> 32 != 0 {
            image.set_fdp(data);
        }
    }
}
