from modelcaskfs.cli import main

main()
