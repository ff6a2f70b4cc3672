from claims import main

main()
