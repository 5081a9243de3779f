//! Selectors as a process sees them: LAR, LSL, VERR, VERW and MOV DS of all 65,536, interpreter against the host CPU.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::Fault;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_testsuite::host::{Host, Regs};
use bivisor_testsuite::world;

/// RAX and the flags ZF after an instruction that takes its selector in CX and RCX, or the fault.
type Seen = Result<(u64, bool), Fault>;

const ZF: u64 = 0x40;

#[test]
fn all_selectors() {
    let Some(mem) = world::flat() else {
        println!("SKIPPED: the host has no room at the addresses of the test world");
        return;
    };
    let mut host = Host::new(64).expect("64-bit code runs here");
    let mut engine = Interpreter::default();
    engine.set_intercepts(Intercepts::EXCEPTIONS);
    // lar eax, ecx; lsl rax, ecx; verr cx; verw cx
    for code in [&[0x0f, 0x02, 0xc1][..], &[0x48, 0x0f, 0x03, 0xc1], &[0x0f, 0x00, 0xe1], &[0x0f, 0x00, 0xe9]] {
        let mut setup = world::Setup {
            bitness: 64,
            code: code.to_vec(),
            count: 1,
            gpr: [0x1111_2222_3333_4444; 16],
            rflags: 0x202,
            image: world::Image::default(),
        };
        world::fill(&mem, &setup);
        host.load(code);
        let mut visible = 0;
        for selector in 0..=0xffff {
            setup.gpr[1] = selector;
            let (fault, regs) = host.run(&Regs { gpr: setup.gpr, rflags: setup.rflags });
            let by_host: Seen = fault.map_or(Ok((regs.gpr[0], regs.rflags & ZF != 0)), Err);
            *engine.state() = setup.state();
            let by_us: Seen = match engine.run(Board { mem: &mem, bus: &EmptyBus }, 1) {
                Exit::Budget => Ok((engine.state().gpr[0], engine.state().rflags.bits() & ZF != 0)),
                Exit::Exception(f) => Err(f),
                exit => panic!("{exit:?}"),
            };
            // The limit of this one is the number of the CPU the thread happens to be on.
            if selector & !3 != 0x78 {
                assert_eq!(by_us, by_host, "{code:02x?} of {selector:#x}");
            }
            visible += u32::from(by_us.is_ok_and(|(_, zf)| zf));
        }
        assert!(visible >= 2, "{code:02x?}: the user's own segments are visible");
    }
}
