"""`python -m kernels_cpu`: says whether the native kernels are there, and what the processor offers."""

from kernels_cpu import available, cpu_features, why_not


def main() -> None:
    if available():
        print(f"native CPU kernels: available; this processor has {', '.join(cpu_features()) or 'no vector features'}")
    else:
        print(f"native CPU kernels: not available, compressed models run slower on the CPU. {why_not()}")


if __name__ == "__main__":
    main()
