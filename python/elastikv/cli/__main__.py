from elastikv.cli import main

main()
