//! Innocuous instructions: the guest's own bytes.

use crate::block::Item;
use crate::lower::memory::{self, MemoryModel};
use crate::lower::{Lowering, attempt, checked};
use crate::marks::What;
use iced_x86::{Mnemonic, OpKind};

/// Copies an instruction; false if its memory operand cannot be emitted.
pub(crate) fn copy(l: &mut Lowering<'_>, item: &Item) -> bool {
    if l.around.model == MemoryModel::Checked && has_memory(item) && item.iced.mnemonic() != Mnemonic::Lea {
        return attempt(l, item, |l| checked::rewrite(l, item));
    }
    if memory::can_stay(l, item) {
        l.mark(What::Copied(item.at));
        let block = l.block;
        l.e.bytes.extend_from_slice(block.code(item));
        return true;
    }
    memory::rewrite(l, item)
}

fn has_memory(item: &Item) -> bool {
    (0..item.iced.op_count()).any(|i| item.iced.op_kind(i) == OpKind::Memory)
}
