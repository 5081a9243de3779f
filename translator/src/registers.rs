//! The guest's general registers in assembly: from the state into the processor and back, for both ways into a cache.
//!
//! In both RBX points to the state, `{rax}` is the offset of RAX in it, and the others follow in the order of their numbers (SDM 2A 2.1.5).

/// Loads all of them, RBX last.
macro_rules! load_registers {
    () => {
        concat!(
            "mov rax, [rbx + {rax}]\n",
            "mov rcx, [rbx + {rax} + 8]\n",
            "mov rdx, [rbx + {rax} + 16]\n",
            "mov rsp, [rbx + {rax} + 32]\n",
            "mov rbp, [rbx + {rax} + 40]\n",
            "mov rsi, [rbx + {rax} + 48]\n",
            "mov rdi, [rbx + {rax} + 56]\n",
            "mov r8, [rbx + {rax} + 64]\n",
            "mov r9, [rbx + {rax} + 72]\n",
            "mov r10, [rbx + {rax} + 80]\n",
            "mov r11, [rbx + {rax} + 88]\n",
            "mov r12, [rbx + {rax} + 96]\n",
            "mov r13, [rbx + {rax} + 104]\n",
            "mov r14, [rbx + {rax} + 112]\n",
            "mov r15, [rbx + {rax} + 120]\n",
            "mov rbx, [rbx + {rax} + 24]\n",
        )
    };
}

/// Stores all but RAX, which has been stored and is used; the guest's RBX is in the slot `{rbx}` of the thread block.
macro_rules! store_others {
    () => {
        concat!(
            "mov [rbx + {rax} + 8], rcx\n",
            "mov [rbx + {rax} + 16], rdx\n",
            "mov rax, gs:[{rbx}]\n",
            "mov [rbx + {rax} + 24], rax\n",
            "mov [rbx + {rax} + 32], rsp\n",
            "mov [rbx + {rax} + 40], rbp\n",
            "mov [rbx + {rax} + 48], rsi\n",
            "mov [rbx + {rax} + 56], rdi\n",
            "mov [rbx + {rax} + 64], r8\n",
            "mov [rbx + {rax} + 72], r9\n",
            "mov [rbx + {rax} + 80], r10\n",
            "mov [rbx + {rax} + 88], r11\n",
            "mov [rbx + {rax} + 96], r12\n",
            "mov [rbx + {rax} + 104], r13\n",
            "mov [rbx + {rax} + 112], r14\n",
            "mov [rbx + {rax} + 120], r15\n",
        )
    };
}

pub(crate) use {load_registers, store_others};
